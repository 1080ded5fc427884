"""A pruning scan as CSV, JSON, a heat map and a table for the terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from slimkit.plain import plain
from slimkit.pruning.sensitivity import Curve

NAME = "pruning"


def write_curves(folder: Path, curves: Sequence[Curve]) -> list[Path]:
    """Write ``pruning.csv``, ``.json`` and ``.png`` and give their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{NAME}.{suffix}" for suffix in ("csv", "json", "png")]
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["group", "channels", "ratio", "removed", "increase", "error", "samples", "layers"]
        )
        for curve in curves:
            for point in curve.points:
                numbers = [point.ratio, point.removed, point.increase, point.error, point.samples]
                layers = " ".join(curve.layers)
                writer.writerow([curve.group, curve.channels, *numbers, layers])
    paths[1].write_text(json.dumps(plain(list(curves)), indent=1) + "\n", encoding="utf-8")
    _plot(paths[2], curves)
    return paths


def curves_table(curves: Sequence[Curve], shown: int) -> Table:
    """The most sensitive groups first: one row each, one column a ratio."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for ratio in _ratios(curves):
        table.add_column(f"{ratio:.0%}", justify="right", no_wrap=True)
    table.add_column("layers", justify="right")
    table.add_column("group", overflow="fold")
    for curve in sorted(curves, key=_worst, reverse=True)[:shown]:
        numbers = [_short(point.increase) for point in curve.points]
        table.add_row(*numbers, str(len(curve.layers)), curve.group)
    return table


def _ratios(curves: Sequence[Curve]) -> list[float]:
    return [point.ratio for point in curves[0].points] if curves else []


def _worst(curve: Curve) -> float:
    """What the most that was tried costs."""
    return curve.increase_at(curve.points[-1].removed) if curve.points else 0.0


def _short(value: float) -> str:
    """Two digits that count; below a thousandth nothing does.

    >>> _short(0.00004), _short(-0.0312), _short(2.345)
    ('0', '-0.031', '2.3')
    """
    return "0" if abs(value) < 5e-4 else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def _plot(path: Path, curves: Sequence[Curve]) -> None:
    """A heat map, groups in the order of the network from top to bottom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm

    ratios = _ratios(curves)
    values = [[max(0.0, point.increase) for point in curve.points] for curve in curves]
    most = max((max(row, default=0.0) for row in values), default=0.0) or 1.0
    figure, axes = pyplot.subplots(figsize=(3.5 + 0.8 * len(ratios), 1.6 + 0.26 * len(curves)))
    # bent, so that the harmless groups can be told apart too
    norm = PowerNorm(0.35, vmin=0.0, vmax=most)
    image = axes.imshow(values, cmap="YlOrRd", norm=norm, aspect="auto")
    for row, curve in enumerate(curves):
        for column, point in enumerate(curve.points):
            dark = norm(max(0.0, point.increase)) > 0.6
            colour = "white" if dark else "black"
            text = _short(point.increase)
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    names = [f"{curve.group}  ({curve.channels})" for curve in curves]
    axes.set_yticks(range(len(curves)), names, fontsize=7)
    axes.set_xticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios])
    axes.set_xlabel("channels of the group removed")
    axes.set_ylabel("group (channels)")
    unit = curves[0].unit if curves else ""
    figure.colorbar(image, ax=axes, label=unit)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
