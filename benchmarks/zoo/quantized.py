"""Quantizes every architecture of the zoo for each runtime and writes the table of results.

python benchmarks/zoo/quantized.py --output runs/zoo-quantized

An interrupted run goes on where it stopped: what is in results.jsonl is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rows import Row, cell, collected, machine, row_of

RUNTIMES = ("onnxruntime", "openvino", "ncnn")
LEAST_DB = 20.0  # of the file against the simulation


def verdict(row: Row) -> str:
    """``ok``, or in which way one runtime's file falls short."""
    if "failure" in row:
        return "failed"
    if not row["finite"]:
        return "wrong output"
    if not row["alive"]:
        return "the output is constant, so this proves nothing"
    if not row["integers"]:
        return "nothing in int8"
    return "ok" if row["decibels"] >= LEAST_DB else "departs"


def table(rows: list[Row]) -> str:
    """All rows as a Markdown table with a summary."""
    heads = [f"{runtime}: | dB | from float | ms | ratio" for runtime in RUNTIMES]
    lines = [
        f"| architecture | {' | '.join(heads)} | reasons |",
        f"| --- | {' | '.join(['--- | ---: | ---: | ---: | ---:'] * len(RUNTIMES))} | --- |",
    ]
    count = dict.fromkeys(RUNTIMES, 0)
    for row in rows:
        cells, reasons = [], []
        for runtime in RUNTIMES:
            found = row.get(runtime) or {"failure": row["failure"]}
            said = verdict(found)
            count[runtime] += said == "ok"
            if "failure" in found:
                cells += [said, "", "", "", ""]
                reasons.append(f"{runtime}: {found['failure']}")
                continue
            cells += [said, f"{found['decibels']:.0f}", f"{found['rounding_db']:.0f}"]
            cells += [f"{found['int8']:.2f}", f"{found['int8'] / found['float']:.2f}"]
        why = reasons[0].partition(": ")[2] if len(set(reasons)) == 1 else "; ".join(reasons)
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {cell(why, 240)} |")
    said = ", ".join(f"{n} on {runtime}" for runtime, n in count.items())
    where = machine("torch", "torchvision", "timm", "onnxruntime", "openvino", "ncnn")
    return "\n".join([f"Of {len(rows)} architectures work: {said} ({where}).", "", *lines, ""])


def main() -> None:
    """Run what is not yet in the results, then write results.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one process")
    parser.add_argument("--seconds", type=float, default=1.0, help="to measure each file for")
    given = parser.parse_args()

    def make(library: str, name: str) -> Row:
        arguments = [library, name, *RUNTIMES, "--seconds", str(given.seconds)]
        row = {"library": library, "name": name}
        return row_of("quantized_one.py", arguments, row, given.limit)

    rows = collected(given.output, given.only, make, "quantizing")
    (given.output / "results.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
