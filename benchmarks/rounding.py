"""What rounding channels to a runtime's multiple gains: ResNet-56 at half of its MACs.

python benchmarks/rounding.py --output benchmarks/rounding.md

Random weights (time does not depend on them), pruned to half of the multiply-accumulates, in float
and int8, for ONNX Runtime and ncnn, one sample on one thread. All files are run in turn, several
rounds; the table has medians, and their ratio to the dense model's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from cifar10.models import resnet56
from rich.progress import track

import slimkit

RUNTIMES = ("onnxruntime", "ncnn")
SIZES = {"dense": None, "round_to: 1": 1, "round_to: 4": 4, "default": None}


def files(folder: Path) -> dict[tuple[str, str, str], tuple[float, Callable[[], object]]]:
    """(size, runtime, precision) -> fraction of the MACs, and one run of the file."""
    torch.manual_seed(0)
    dense, x = resnet56().eval(), torch.randn(1, 3, 32, 32)
    data = [torch.randn(32, 3, 32, 32)]
    made = {}
    for name, round_to in track(SIZES.items(), "exporting"):
        model, left = dense, 1.0
        if name != "dense":
            options = {"round_to": round_to} if round_to else {"backend": RUNTIMES}
            model = slimkit.prune(dense, x, target={"flops": 0.5}, **options)
            before, after = model.slimkit_pruning.macs
            left = after / before
        for runtime in RUNTIMES:
            for precision in ("float", "int8"):
                quantized = precision == "int8"
                one = slimkit.quantize(model, data=data, backend=runtime) if quantized else model
                target = folder / f"{len(made)}"
                artifact = slimkit.export(one, x, backend=runtime, directory=target)
                made[name, runtime, precision] = left, lambda a=artifact: a.run(x)
    return made


def main() -> None:
    """Measure, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = files(Path(folder))
        times: dict[tuple[str, str, str], list[float]] = {key: [] for key in made}
        for _ in track(range(given.rounds), "measuring"):
            for key, (_, run) in made.items():
                for count in range(30):
                    begin = time.perf_counter()
                    run()
                    if count >= 5:
                        times[key].append((time.perf_counter() - begin) * 1e3)
    kinds = [(runtime, precision) for runtime in RUNTIMES for precision in ("float", "int8")]
    heads = ["", "MACs left", *(f"{runtime}, {precision}" for runtime, precision in kinds)]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for name in SIZES:
        row = [name, f"{made[name, *kinds[0]][0]:.3f}"]
        for kind in kinds:
            ms, dense = (statistics.median(times[size, *kind]) for size in (name, "dense"))
            row.append(f"{ms:.2f} ms ({ms / dense:.2f})")
        lines.append(f"| {' | '.join(row)} |")
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "onnxruntime", "ncnn"))
    where = f"{platform.machine()}, {os.cpu_count()} cores, {packages}"
    table = "\n".join([*lines, "", f"Milliseconds of a sample on one thread ({where}).", ""])
    print(table)
    if given.output is not None:
        given.output.write_text(table)


if __name__ == "__main__":
    main()
