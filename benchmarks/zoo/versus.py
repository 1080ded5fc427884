"""Plans and cuts with slimkit and with Torch-Pruning in turn: success, seconds, peak memory.

python benchmarks/zoo/versus.py --repeat 3

Each run is a process of its own; the medians are compared. Both cut in half: slimkit the
multiply-accumulates, Torch-Pruning (which has no such target without a search of its own) the
channels of every layer.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from rich.progress import track
from run import architectures, one, verdict

NAMES = "resnet50,mobilenet_v2,densenet121,cspdarknet53,swin_t,vit_b_16"
TOOLS = ("slimkit", "torch-pruning")


def cells(rows: list[dict[str, Any]]) -> tuple[str, float | None]:
    """Verdict, median seconds and peak memory as table cells, and the seconds alone."""
    said = verdict(rows[-1], 0.5)
    if said == "failed":
        return f"{rows[-1]['failure'][:60]} | | |", None
    seconds = statistics.median(row["seconds"] for row in rows)
    peak = statistics.median(row["peak_mib"] for row in rows)
    return f"{said}, {rows[-1]['macs']:.2f} of the MACs | {seconds:.2f} | {peak:.0f} |", seconds


def main() -> None:
    """Run both tools in turn and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=NAMES, help="names, separated by commas")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one process")
    given = parser.parse_args()
    wanted = [a for a in architectures() if a[1] in given.only.split(",")]
    runs = [(a, tool) for a in wanted for _ in range(given.repeat) for tool in TOOLS]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (library, name), tool in track(runs, "pruning"):
        earlier = found.setdefault((name, tool), [])
        if not earlier or "failure" not in earlier[-1]:
            earlier.append(one(library, name, tool, 0.5, given.limit))
    print("| architecture | slimkit | s | MiB | Torch-Pruning | s | MiB | time ratio |")
    print("| --- | --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for _, name in wanted:
        ours, our_seconds = cells(found[name, "slimkit"])
        theirs, their_seconds = cells(found[name, "torch-pruning"])
        both = our_seconds is not None and their_seconds is not None
        ratio = f"{our_seconds / their_seconds:.2f}" if both else ""
        print(f"| {name} | {ours} {theirs} {ratio} |")


if __name__ == "__main__":
    main()
