"""Prunes every architecture of the zoo, one process each, and writes the table of results.

python benchmarks/zoo/run.py --output benchmarks/zoo/results          # slimkit
python benchmarks/zoo/run.py --tool torch-pruning --only resnet50,swin_t --output /tmp/peer

An interrupted run goes on where it stopped: what is in results.jsonl is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rows import Row, cell, collected, machine, row_of

TOOLS = ("slimkit", "torch-pruning", "torch-pruning-to-target")
TOLERANCE = 1e-3  # relative to the largest output, float32


def one(library: str, name: str, tool: str, target: float, limit: float) -> Row:
    """The row of one architecture."""
    arguments = [library, name, "--tool", tool, "--target", str(target)]
    return row_of("one.py", arguments, {"library": library, "name": name, "tool": tool}, limit)


def verdict(row: Row, target: float) -> str:
    """``ok``, or in which way the result falls short."""
    if "failure" in row:
        return "failed"
    if not (row["shapes"] and row["finite"]):
        return "wrong output"
    if not row["alive"]:
        return "the output is constant, so this proves nothing"
    if row.get("error", 0.0) > TOLERANCE:
        return "wrong numbers"
    if not (row["backward"] and row["exports"]):
        return "does not train or export"
    if row["tool"] == "slimkit" and abs(row["macs"] - target) > 0.05:
        return "target missed"
    return "ok"


def table(rows: list[Row], target: float) -> str:
    """All rows as a Markdown table with a summary."""
    lines = [
        "| architecture | verdict | MACs left | params left | seconds | peak MiB | why not more |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    verdicts = [verdict(row, target) for row in rows]
    for row, said in zip(rows, verdicts, strict=True):
        numbers = ["", "", "", ""]
        if "macs" in row:
            numbers[:2] = [f"{row['macs']:.3f}", f"{row['params']:.3f}"]
        if "seconds" in row:
            numbers[2] = f"{row['seconds']:.1f}"
        if "peak_mib" in row:
            numbers[3] = f"{row['peak_mib']:.0f}"
        why = row.get("failure") or "; ".join(row.get("reasons", []))
        lines.append(f"| {row['name']} | {said} | {' | '.join(numbers)} | {cell(why)} |")
    count = sum(said == "ok" for said in verdicts)
    where = machine("torch", "torchvision", "timm")
    return "\n".join([f"{count} of {len(rows)} ok ({where}).", "", *lines, ""])


def main() -> None:
    """Run what is not yet in the results, then write results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=TOOLS, default="slimkit")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one process")
    given = parser.parse_args()

    def make(library: str, name: str) -> Row:
        return one(library, name, given.tool, given.target, given.limit)

    rows = collected(given.output, given.only, make, "pruning")
    (given.output / "results.md").write_text(table(rows, given.target))
    print(table(rows, given.target))


if __name__ == "__main__":
    main()
