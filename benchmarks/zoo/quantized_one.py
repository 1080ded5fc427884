"""Quantizes one architecture for each runtime and prints what came out as one line of JSON.

python benchmarks/zoo/quantized_one.py torchvision mobilenet_v2 onnxruntime ncnn
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from one import build
from torch import Tensor, nn

import slimkit
from slimkit.batches import first_sample
from slimkit.deploy.agreement import compare
from slimkit.deploy.deployed import compile_, simulate
from slimkit.deploy.measurement import measure
from slimkit.deploy.release import is_integer
from slimkit.registry import discover

CALIBRATION, TEST = 16, 8  # images


def quantized(model: nn.Module, images: Tensor, runtime: str, seconds: float) -> dict[str, Any]:
    """Post-training int8 with slimkit's defaults, as the runtime's file computes it.

    Args:
        model: in evaluation mode.
        images: (`CALIBRATION` + `TEST`, 3, height, width).
        runtime: a backend's name.
        seconds: to measure each file for.
    """
    calibration, test = images[:CALIBRATION], images[CALIBRATION:]
    example = first_sample((test,))
    backend = discover().create("backend", runtime)
    begin = time.perf_counter()
    fake = slimkit.quantize(model, calibration.split(4), runtime)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        _, plain = compile_(model, backend, example, Path(name) / "float")
        _, small = compile_(fake, backend, example, Path(name) / "int8")
        found: dict[str, Any] = {"seconds": time.perf_counter() - begin}
        operators = backend.operators(Path(name) / "int8")
        found["integers"] = sum(n for kind, n in operators.items() if is_integer(kind))
        reference, simulated, deployed = (
            simulate(model, test),
            simulate(fake, test),
            small.flat(test),
        )
        found["finite"] = all(bool(y.isfinite().all()) for y in deployed)
        found["alive"] = float(reference[0].std(0).max()) > 0
        file, rounding = compare(simulated, deployed), compare(reference, deployed)
        found |= {"agrees": file.share, "decibels": min(file.sqnr_db)}
        found["rounding_db"] = min(rounding.sqnr_db)
        times = measure({"float": plain.runner, "int8": small.runner}, example, seconds=seconds)
        found |= {kind: latency.median_ms for kind, latency in times.items()}
    return found


def main() -> None:
    """Quantize for each runtime and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["torchvision", "timm"])
    parser.add_argument("name")
    parser.add_argument("runtimes", nargs="+", help="backends")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    model, example = build(given.library, given.name)
    torch.manual_seed(1)
    images = torch.randn(CALIBRATION + TEST, *example.shape[1:])
    row: dict[str, Any] = {"library": given.library, "name": given.name}
    for runtime in given.runtimes:
        try:
            row[runtime] = quantized(model, images, runtime, given.seconds)
        except Exception as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            row[runtime] = {"failure": f"{type(error).__name__}: {' '.join(said[:2])}"}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
