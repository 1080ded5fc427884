"""What rewrites of pretrained detectors cost, and how much faster ONNX Runtime gets.

    PYTHONPATH=.:benchmarks python benchmarks/rewriting.py --data DATA \
        --output benchmarks/rewriting.md

AP needs pycocotools (`pip install -c constraints.txt pycocotools`).

Outputs are compared on COCO's val2017 images right after each rewrite, without any training. The
files, of the model as it is and after each rewrite by itself, take turns in one process on one
thread; the table has their medians over the first's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from tasks import detector

import slimkit

REWRITES = {
    "yolox_nano": ("focus-to-conv", "silu-to-hardswish", "sigmoid-to-hardsigmoid"),
    "fastestdet": ("sigmoid-to-hardsigmoid",),
}


def rows(name: str, root: str, images: int, rounds: int, folder: Path) -> list[list[str]]:
    """One row a rewrite."""
    task = detector(root, name)
    inputs = task.test[:images]
    files = {"as it is": slimkit.export(task.model, task.example, directory=folder / "before")}
    done = {}
    before, after = task.of(task.model), {}
    for rewrite in REWRITES[name]:
        data = [(x,) for x in inputs.split(8)]
        fast = slimkit.rewrite(task.model, task.example, rewrite, data=data, batches=len(data))
        done[rewrite] = fast.slimkit_rewriting.done[0]
        after[rewrite] = task.of(fast)
        files[rewrite] = slimkit.export(fast, task.example, directory=folder / rewrite)
    times: dict[str, list[float]] = {key: [] for key in files}
    for _ in range(rounds):
        for key, file in files.items():
            begin = time.perf_counter()
            file.run(task.example)
            times[key].append(time.perf_counter() - begin)
    dense = statistics.median(times["as it is"])
    table = []
    for rewrite, one in done.items():
        known = [db for db in one.sqnr_db if db is not None]
        cost = f"{min(known):.1f} dB" if known else "exact"
        ratio = statistics.median(times[rewrite]) / dense
        score = f"{before:.3f} to {after[rewrite]:.3f}"
        table.append([name, rewrite, str(one.places), cost, score, f"{ratio:.2f}"])
    return table


def main() -> None:
    """Measure, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="the data folder; left out: SLIMKIT_DATA")
    parser.add_argument("--images", type=int, default=32, help="to compare outputs on")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--models", nargs="*", default=list(REWRITES), choices=list(REWRITES))
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    heads = ["model", "rewrite", "places", "SQNR", "AP (128 images)", "time over the original's"]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(name, given.data, given.images, given.rounds, Path(folder)):
                lines.append(f"| {' | '.join(row)} |")
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "onnxruntime"))
    where = f"{platform.machine()}, {os.cpu_count()} cores, {packages}"
    table = "\n".join([*lines, "", f"One thread, one sample ({where}).", ""])
    print(table)
    if given.output is not None:
        given.output.write_text(table)


if __name__ == "__main__":
    main()
