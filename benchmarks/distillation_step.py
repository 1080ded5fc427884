"""What slimkit and its teachers cost a training step: ResNet-20 on CIFAR-10 shapes.

OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/distillation_step.py --clock cpu \
    --output benchmarks/distillation_step.md

A step is what Lightning's Trainer takes from the end of one batch to the end of the next: hooks,
forward, backward and optimizer on a batch of 128, in channels-last memory. The plain module and
slimkit's take turns, a few steps each, so that what else the machine does meets them alike; the
table has medians. On a machine that others use, `--clock cpu` counts the processor's seconds of all
threads instead.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.cifar10.models import resnet20, resnet56
from slimkit import SlimModule
from slimkit.recipe import Optimizer
from slimkit.training.classification import Classification

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STEPS, DROPPED = 8, 2  # of a turn, and of these not counted


def batches() -> list[tuple[Tensor, Tensor]]:
    """Always the same, so that a cache knows them from the second turn on."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS, 128, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (STEPS, 128), generator=generator)
    return [
        (x.to(memory_format=torch.channels_last), y) for x, y in zip(images, labels, strict=True)
    ]


def student() -> Classification:
    """A ResNet-20 whose step is that of slimkit's own classification."""
    torch.manual_seed(0)
    model = resnet20().to(memory_format=torch.channels_last)
    return Classification(model, Optimizer(lr=1e-3, schedule="constant"))


def bigger() -> nn.Module:
    """The larger teacher."""
    return resnet56().to(memory_format=torch.channels_last)


def modules(cache: str) -> dict[str, pl.LightningModule]:
    """What is measured, by name."""
    kl: dict[str, Any] = {"losses": ["kl"]}
    big = {"name": "benchmarks.distillation_step:bigger"}
    hint = {"losses": ["kl", {"name": "hint", "at": "layer3"}], "teacher": big}
    sections: dict[str, Any] = {
        "slimkit, no plugin": False,
        "kl, ResNet-20 cached": {**kl, "cache": cache},
        "kl, ResNet-56 cached": {**kl, "teacher": big, "cache": cache},
        "kl and hint at layer3, ResNet-56 cached": {**hint, "cache": cache},
        "kl, ResNet-20 live": kl,
        "kl, ResNet-56 live": {**kl, "teacher": big},
        "kl, average of itself": {**kl, "teacher": "ema"},
        "kl, a peer": {**kl, "teacher": "mutual"},
    }
    made = {name: SlimModule(student(), {"distill": given}) for name, given in sections.items()}
    return {"plain LightningModule": student(), **made}


class Times(pl.Callback):
    """Seconds from one batch's end to the next's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *_args: Any) -> None:
        """Take the time."""
        now = self.clock()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def turn(module: pl.LightningModule, data: list[Any], clock: Callable[[], float]) -> list[float]:
    """Seconds of some steps of a training."""
    times = Times(clock)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[times],
    )
    trainer.fit(module, train_dataloaders=DataLoader(data, batch_size=None))
    return times.seconds[DROPPED:]


def forward(model: nn.Module, data: list[Any], clock: Callable[[], float]) -> list[float]:
    """Seconds of a teacher's forward."""
    found = []
    with torch.no_grad():
        for images, _ in data:
            begin = clock()
            model(images)
            found.append(clock() - begin)
    return found[DROPPED:]


def main() -> None:
    """Measure, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    clock, data = CLOCKS[given.clock], batches()
    with tempfile.TemporaryDirectory() as cache:
        steps = modules(cache)
        teachers = {"ResNet-20": student().model.eval(), "ResNet-56": bigger().eval()}
        seconds: dict[str, list[float]] = {name: [] for name in [*steps, *teachers]}
        for n in track(range(given.turns + 1), "measuring"):
            for name, module in steps.items():
                found = turn(module, data, clock)
                seconds[name] += found if n else []  # the first turn fills the caches
            for name, teacher in teachers.items():
                seconds[name] += forward(teacher, data, clock) if n else []
    median = {name: statistics.median(found) for name, found in seconds.items()}
    plain = median["plain LightningModule"]
    lines = ["| step | ms | over the plain one's |", "| --- | ---: | ---: |"]
    lines += [f"| {n} | {median[n] * 1e3:.1f} | {median[n] / plain:.3f} |" for n in steps]
    lines += [f"| forward of {n} alone | {median[n] * 1e3:.1f} | |" for n in teachers]
    what = "processor time of all threads" if given.clock == "cpu" else "wall time"
    note = (
        f"Medians of {len(seconds['ResNet-20'])} steps each, {what}, batch 128, float32. "
        f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {version('torch')}, pytorch-lightning {version('pytorch-lightning')}."
    )
    table = "\n".join([*lines, "", note, ""])
    print(table)
    if given.output is not None:
        given.output.write_text(table)


if __name__ == "__main__":
    main()
