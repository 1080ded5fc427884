"""A quantization scan as CSV, JSON, a plot and a table for the terminal."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from slimkit.plain import plain
from slimkit.quantization.sensitivity import Sensitivity

SHOWN = 30  # places in the plot


def write_scan(folder: Path, name: str, ranked: Sequence[Sensitivity]) -> list[Path]:
    """Write ``<name>.csv``, ``.json`` and ``.png`` and give their paths."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("csv", "json", "png")]
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["place", "kind", "sqnr_db", "calls"])
        for one in ranked:
            writer.writerow([one.quantizer, one.kind, one.sqnr_db, " ".join(one.calls)])
    paths[1].write_text(json.dumps(plain(ranked), indent=1) + "\n", encoding="utf-8")
    _plot(paths[2], ranked)
    return paths


def scan_table(ranked: Sequence[Sensitivity], shown: int) -> Table:
    """The most harmful places."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("dB", justify="right")
    table.add_column("kind")
    table.add_column("place", overflow="fold")
    for one in ranked[:shown]:
        table.add_row(f"{one.sqnr_db:.1f}", one.kind, one.quantizer)
    return table


def _plot(path: Path, ranked: Sequence[Sensitivity]) -> None:
    """Bars of the most harmful places, the worst on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    worst = [one for one in ranked if math.isfinite(one.sqnr_db)][:SHOWN][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.25 * len(worst)))
    colours = ["#b5542c" if one.kind == "weight" else "#2c6fb5" for one in worst]
    axes.barh([one.quantizer for one in worst], [one.sqnr_db for one in worst], color=colours)
    axes.axvline(20, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("signal to noise at the last layers, dB (dashed: noise of 1 %)")
    axes.tick_params(axis="y", labelsize=7)
    marks = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in ("#2c6fb5", "#b5542c")]
    axes.legend(marks, ["activation", "weight"], loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
