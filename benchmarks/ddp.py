"""DDP with two processes beside one process, same batch over all: time and result.

    PYTHONPATH=.:benchmarks python benchmarks/ddp.py --data ../shared/data \
        --output benchmarks/ddp.md

A ResNet-20 with the weights of --data is pruned to half of its multiply-accumulates, distilled from
its dense self and trained in simulated integers for the second half, all by one recipe: in one
process on two threads with batches of --batch, and in two processes on one thread each with batches
of half of that. Two seeds of one process show how far apart two runs are anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from cifar10.data import Cifar10
from cifar10.models import resnet20
from torch import nn
from zoo.rows import machine

from slimkit import SlimModule

RECIPE = {
    "task": "classification",
    "prune": {"criterion": "taylor", "target": {"flops": 0.5}, "during": [0.0, 0.3], "steps": 4},
    "quantize": {"train_from": 0.5},
    "optimizer": {"lr": 0.01},
}
VARIANTS = {
    "one process, 2 threads": (1, 2, 0),
    "two processes, 1 thread each": (2, 1, 0),
    "one process, another seed": (1, 2, 1),
}


def worker(given: argparse.Namespace) -> None:
    """Train one variant; the first process prints what came out as JSON."""
    processes, threads, seed = VARIANTS[given.variant]
    torch.set_num_threads(threads)
    pl.seed_everything(seed, verbose=False)
    data = Cifar10(
        given.data,
        train_images=given.images,
        batch_size=given.batch // processes,
        seed=seed,
    )
    weights = Path(given.data) / "weights/cifar10_resnet20.safetensors"
    module = SlimModule(resnet20(str(weights)), RECIPE)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=given.epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    begin = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - begin
    if not trainer.is_global_zero:
        return
    network = module.network.eval()
    right = _right(module, network, data)
    kept = {name: dims for name, dims in network.slimkit_pruning.kept.items()}
    found = {"seconds": seconds, "right": right, "macs": module.state.macs_left, "kept": kept}
    given.result.write_text(json.dumps(found))


@torch.no_grad()
def _right(module: SlimModule, network: nn.Module, data: Cifar10) -> list[int]:
    """Whether each test image is classified rightly, in simulated integers."""
    found = []
    for x, y in data.test_dataloader():
        assert module.fake is not None
        with module.fake.active(network):
            found += (network(x).argmax(1) == y).int().tolist()
    return found


def run(variant: str) -> dict[str, Any]:
    """One variant in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        more = ["--variant", variant, "--result", str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(VARIANTS[variant][1])}
        begin = time.perf_counter()
        subprocess.run([sys.executable, *sys.argv, *more], check=True, env=environment)
        found: dict[str, Any] = json.loads(result.read_text())
        found["whole"] = time.perf_counter() - begin
        return found


def shared(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The part of the kept output channels that two runs have in common."""
    both = total = 0
    for name, dims in a["kept"].items():
        mine, theirs = set(dims.get("0", ())), set(b["kept"].get(name, {}).get("0", ()))
        both, total = both + len(mine & theirs), total + len(mine | theirs)
    return both / max(1, total)


def main() -> None:
    """Train all variants one after the other, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the data folder")
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--batch", type=int, default=128, help="over all processes")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant is not None:
        worker(given)
        return
    rows = {variant: run(variant) for variant in VARIANTS}
    first = next(iter(rows.values()))
    lines = [
        "| | training, s | ratio | with start, s | MACs left | test | same channels kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        accuracy = sum(row["right"]) / len(row["right"])
        lines.append(
            f"| {name} | {row['seconds']:.0f} | {row['seconds'] / first['seconds']:.2f} | "
            f"{row['whole']:.0f} | {row['macs']:.1%} | {accuracy:.1%} | {shared(first, row):.1%} |"
        )
    note = (
        f"ResNet-20 on {given.images:,} images of CIFAR-10, {given.epochs} epochs, batches of "
        f"{given.batch} over all processes; gloo on one machine. Batch-norm sees half of a batch "
        "in each of two processes, and each process augments by numbers of its own: results are "
        "not those of one process to the last bit. Test: top-1 in simulated integers on 1,000 "
        f"images, with a standard error of 0.8 points ({machine('torch', 'pytorch-lightning')})."
    )
    found = "\n".join([*lines, "", note, ""])
    print(found)
    if given.output is not None:
        given.output.write_text(found)


if __name__ == "__main__":
    main()
