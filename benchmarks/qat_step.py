"""What a step of quantization-aware training costs over a float one: ResNet-20 on CIFAR-10 shapes.

OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/qat_step.py --output benchmarks/qat_step.md

One step is forward, backward and optimizer on a batch of 128, in float32 and under bfloat16
autocast, in channels-last memory as `benchmarks/cifar10` trains. Float and quantization-aware
steps take turns, so that what else the machine does meets them alike; the table has medians. On
a machine that others use, `--clock cpu` counts the processor's seconds of all threads instead. If
torchao is importable (pip install --target /tmp/torchao torchao; PYTHONPATH=/tmp/torchao), its PT2E
quantization-aware training for the same integer arithmetic is measured beside.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import track
from torch import nn
from torch.nn import functional

from benchmarks.cifar10.models import resnet20
from slimkit.quantization.calibration import calibrate_, maker
from slimkit.quantization.fake import FakeQuantization
from slimkit.registry import discover

KINDS = (  # backend, quantizer of weights, quantizer of activations
    ("onnxruntime", "minmax", "percentile"),
    ("onnxruntime", "lsq", "lsq"),
    ("onnxruntime", "lsq", "pact"),
    ("ncnn", "minmax", "percentile"),
    ("ncnn", "lsq", "lsq"),
)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}

Step = Callable[[], None]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """128 images and labels, always the same."""
    torch.manual_seed(0)
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    return images, torch.randint(10, (128,))


def training_step(
    model: nn.Module, precision: torch.dtype | None, fake: FakeQuantization | None = None
) -> Step:
    """One step of SGD on `model`, through `fake` if given."""
    images, labels = batch()
    parameters = [*model.parameters(), *(fake.parameters() if fake is not None else ())]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9)

    def step() -> None:
        rounding = fake.active(model) if fake is not None else nullcontext()
        with rounding, torch.autocast("cpu", precision, enabled=precision is not None):
            loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def slimkit_step(
    backend: str, weights: str, activations: str, precision: torch.dtype | None
) -> Step:
    """A step of quantization-aware training by slimkit."""
    model, (images, _) = resnet20().train(), batch()
    scheme = discover().create("backend", backend).scheme
    fake = FakeQuantization.of(model, (images[:1],), scheme, maker(weights), maker(activations))
    calibrate_(fake, model, [images], 1)
    return training_step(model, precision, fake)


def torchao_step(precision: torch.dtype | None) -> Step:
    """A step of torchao's PT2E quantization-aware training, uint8 activations and int8 weights."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    images, _ = batch()
    program = torch.export.export(resnet20().train(), (images,))
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    model = prepare_qat_pt2e(program.module(), quantizer)
    return training_step(move_exported_model_to_train(model), precision)


def measured(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each step; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in track(range(rounds + 2), "measuring"):
        for name, step in steps.items():
            begin = clock()
            step()
            if turn >= 2:
                times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    peer = importlib.util.find_spec("torchao") is not None
    seconds: dict[str, dict[str, float]] = {}
    for label, precision in PRECISIONS.items():
        steps = {"float": training_step(resnet20().train(), precision)}
        for backend, weights, activations in KINDS:
            name = f"slimkit, {backend}: {weights} weights, {activations} activations"
            steps[name] = slimkit_step(backend, weights, activations, precision)
        if peer:
            steps["torchao PT2E, X86InductorQuantizer"] = torchao_step(precision)
        seconds[label] = measured(steps, given.rounds, CLOCKS[given.clock])
    lines = ["| step | float32 | bfloat16 autocast |", "| --- | ---: | ---: |"]
    for name in seconds["float32"]:
        cells = [
            f"{found[name] * 1e3:.0f} ms ({found[name] / found['float']:.2f})"
            for found in seconds.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", *(["torchao"] if peer else [])))
    where = f"{platform.machine()}, {threads} threads, {packages}"
    what = "wall time" if given.clock == "wall" else "processor time of all threads"
    note = f"Median {what} of {given.rounds} steps on a batch of 128 ({where})."
    table = "\n".join([*lines, "", note, ""])
    print(table)
    if given.output is not None:
        given.output.write_text(table)


if __name__ == "__main__":
    main()
