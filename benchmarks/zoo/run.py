"""Prunes every architecture of the zoo, one process each, and writes the table of results.

python benchmarks/zoo/run.py --output benchmarks/zoo/results          # slimkit
python benchmarks/zoo/run.py --tool torch-pruning --only resnet50,swin_t --output /tmp/peer

An interrupted run goes on where it stopped: what is in results.jsonl is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import track

HERE = Path(__file__).parent
TOOLS = ("slimkit", "torch-pruning", "torch-pruning-to-target")
TOLERANCE = 1e-3  # relative to the largest output, float32


def architectures() -> list[tuple[str, str]]:
    """Library and name of each architecture."""
    lines = (HERE / "architectures.txt").read_text().splitlines()
    return [(line.split()[0], line.split()[1]) for line in lines if not line.startswith("#")]


def one(library: str, name: str, tool: str, target: float, limit: float) -> dict[str, Any]:
    """The row of one architecture; a process that dies or takes too long is a row as well."""
    command = [sys.executable, str(HERE / "one.py"), library, name]
    command += ["--tool", tool, "--target", str(target)]
    row: dict[str, Any] = {"library": library, "name": name, "tool": tool}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False, env=os.environ
        )
    except subprocess.TimeoutExpired:
        return row | {"failure": f"took more than {limit:.0f} s"}
    last = (done.stdout.splitlines() or [""])[-1]
    if not last.startswith("{"):
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return row | {"failure": said}
    found: dict[str, Any] = json.loads(last)
    return found


def verdict(row: dict[str, Any], target: float) -> str:
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


def table(rows: list[dict[str, Any]], target: float) -> str:
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
        why = why.replace("|", "\\|")
        why = why if len(why) <= 160 else f"{why[:157]}..."
        lines.append(f"| {row['name']} | {said} | {' | '.join(numbers)} | {why} |")
    count = sum(said == "ok" for said in verdicts)
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "torchvision", "timm"))
    where = f"{platform.machine()}, {os.cpu_count()} cores, {packages}"
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
    given.output.mkdir(parents=True, exist_ok=True)
    kept = given.output / "results.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    done = {row["name"] for row in rows}
    wanted = [a for a in architectures() if not given.only or a[1] in given.only.split(",")]
    for library, name in track([a for a in wanted if a[1] not in done], "pruning"):
        rows.append(one(library, name, given.tool, given.target, given.limit))
        with kept.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    order = [name for _, name in wanted]
    rows = sorted((r for r in rows if r["name"] in order), key=lambda r: order.index(r["name"]))
    (given.output / "results.md").write_text(table(rows, given.target))
    print(table(rows, given.target))


if __name__ == "__main__":
    main()
