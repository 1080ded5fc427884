"""Writes the table of an artifact into a Markdown file, between its markers.

python benchmarks/readme_table.py runs/demo
python benchmarks/readme_table.py runs/cifar10 benchmarks/cifar10/README.md
"""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

from slimkit.report.table import cells, footnote, headings

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- table: {} -->", "<!-- end of table -->"


def table(artifact: Path) -> str:
    """The measurements of an artifact as a Markdown table with a line on where they were taken."""
    metrics = json.loads((artifact / "slimkit.json").read_text())["metrics"]
    rows, metric = metrics["rows"], metrics["metric"]["name"]
    heads = headings(metric)
    lines = [
        f"| {' | '.join(heads)} |",
        f"|{'|'.join([' --- '] * 2 + [' ---: '] * (len(heads) - 2))}|",
    ]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "ncnn"))
    where = f"{platform.machine()} ({cpu()}), {packages}"
    note = footnote(metrics["data"], rows[0]["agreement"]["inputs"], metric, rows)
    return "\n".join([*lines, "", f"{note} Measured on {where}."])


def cpu() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found.group(1) if found else platform.processor()


def main(artifact: str, file: str = "README.md") -> None:
    """Replace what stands between the markers."""
    path = ROOT / file
    text = path.read_text()
    where = "" if file == "README.md" else f" {file}"
    begin = BEGIN.format(f"python benchmarks/readme_table.py {artifact}{where}")
    pattern = re.compile(r"<!-- table: .*? -->.*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{path} has no place for a table: write {begin} and {END} into it")
    new = f"{begin}\n{table(Path(artifact))}\n{END}"
    path.write_text(pattern.sub(lambda _: new, text))


if __name__ == "__main__":
    main(*sys.argv[1:])
