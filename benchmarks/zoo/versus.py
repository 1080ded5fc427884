"""Plans and cuts with slimkit and with Torch-Pruning in turn: success, seconds, peak memory.

python benchmarks/zoo/versus.py --repeat 3 --output benchmarks/zoo/versus.md

Each run is a process of its own; the medians are compared. slimkit cuts to half of the
multiply-accumulates, verifies every group and measures the result. Torch-Pruning runs twice: one
step to half of each layer's channels, without a target and unverified; and, as its examples do, in
steps until half of the multiply-accumulates are gone.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from rich.progress import track
from rows import architectures, machine
from run import TOOLS, one, verdict

NAMES = "resnet50,mobilenet_v2,densenet121,cspdarknet53,swin_t,vit_b_16"
HEADS = """| architecture | slimkit | s | MiB | Torch-Pruning, one step | s | MiB | ratio |\
 Torch-Pruning, to the target | s | MiB | ratio |
| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |"""


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], float | None]:
    """Verdict, median seconds and peak memory as table cells, and the seconds alone."""
    said = verdict(rows[-1], 0.5)
    if said == "failed":
        return [rows[-1]["failure"][:60].replace("|", "/"), "", ""], None
    seconds = statistics.median(row["seconds"] for row in rows)
    peak = statistics.median(row["peak_mib"] for row in rows)
    left = f"{said}, {rows[-1]['macs']:.2f} of the MACs"
    return [left, f"{seconds:.2f}", f"{peak:.0f}"], seconds


def line(name: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """One architecture as a row of the table."""
    ours, our_seconds = cells(found[name, TOOLS[0]])
    row = [name, *ours]
    for tool in TOOLS[1:]:
        theirs, seconds = cells(found[name, tool])
        both = our_seconds is not None and seconds is not None
        row += [*theirs, f"{our_seconds / seconds:.2f}" if both else ""]
    return f"| {' | '.join(row)} |"


def main() -> None:
    """Run all tools in turn, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=NAMES, help="names, separated by commas")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one process")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    wanted = [a for a in architectures() if a[1] in given.only.split(",")]
    runs = [(a, tool) for a in wanted for _ in range(given.repeat) for tool in TOOLS]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (library, name), tool in track(runs, "pruning"):
        earlier = found.setdefault((name, tool), [])
        if not earlier or "failure" not in earlier[-1]:
            earlier.append(one(library, name, tool, 0.5, given.limit))
    where = machine("torch", "torch-pruning")
    lines = [HEADS, *(line(name, found) for _, name in wanted)]
    table = "\n".join([*lines, "", f"Medians of {given.repeat} processes ({where}).", ""])
    print(table)
    if given.output is not None:
        given.output.write_text(table)


if __name__ == "__main__":
    main()
