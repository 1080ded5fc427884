"""Rows of results, one process each, kept as they come so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.progress import track

HERE = Path(__file__).parent

Row = dict[str, Any]


def architectures() -> list[tuple[str, str]]:
    """Library and name of each architecture."""
    lines = (HERE / "architectures.txt").read_text().splitlines()
    return [(line.split()[0], line.split()[1]) for line in lines if not line.startswith("#")]


def row_of(
    script: str, arguments: list[str], row: Row, limit: float, python: str = sys.executable
) -> Row:
    """What `script` prints in its last line; one that dies or takes too long is a row as well."""
    command = [python, str(HERE / script), *arguments]
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
    found: Row = json.loads(last)
    return found


def kept(folder: Path) -> list[Row]:
    """The rows in ``results.jsonl`` of a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def keep_(folder: Path, rows: list[Row], row: Row) -> None:
    """Add one row to `rows` and to ``results.jsonl``."""
    rows.append(row)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def collected(folder: Path, only: str, make: Callable[[str, str], Row], doing: str) -> list[Row]:
    """The rows of all architectures in order; those in ``results.jsonl`` are not made again.

    Args:
        folder: for ``results.jsonl``.
        only: names, separated by commas; empty for all.
        make: the row of a library's architecture.
        doing: what the progress bar is called.
    """
    rows = kept(folder)
    done = {row["name"] for row in rows}
    wanted = [a for a in architectures() if not only or a[1] in only.split(",")]
    for library, name in track([a for a in wanted if a[1] not in done], doing):
        keep_(folder, rows, make(library, name))
    order = [name for _, name in wanted]
    return sorted((r for r in rows if r["name"] in order), key=lambda r: order.index(r["name"]))


def machine(*packages: str) -> str:
    """Processor and versions of the packages that are there."""
    found = [f"{platform.machine()}, {os.cpu_count()} cores"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def cell(text: str, most: int = 160) -> str:
    """`text` for a Markdown table, cut to `most` characters."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= most else f"{text[: most - 3]}..."
