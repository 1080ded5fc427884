"""One long run: ResNet-56 on CIFAR-10 at 2.5 times fewer multiply-accumulates, and recovered.

    PYTHONPATH=.:benchmarks python benchmarks/recovery.py --data ../shared/data \
        --work runs/recovery --output benchmarks/recovery.md

A dense network is trained on the first 40,000 training images. slimkit prunes it with its default
recipe (only model, data, target and epochs are given) and Torch-Pruning's group-norm pruner cuts
the same network to the same target at once, which is then fine-tuned plainly with the same
optimizer, schedule, batches and epochs. Both are tested after the last epoch on the 10,000 training
images that nobody saw, and on the 1,000 test images. Nothing is chosen by these accuracies.

What is finished lies in --work and is not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cifar10.data import Cifar10
from cifar10.models import ResNet
from long_training import trained
from torch import Tensor, nn
from zoo.rows import machine

from slimkit.pruning.cost import macs

N = 9  # ResNet-56
TRAIN, HELD_OUT = 40_000, 10_000
TARGET = 0.4  # of the multiply-accumulates
SEED = 0
FROM_SCRATCH = {"optimizer": {"name": "sgd", "lr": 0.1}, "distill": False}

Row = dict[str, Any]


def row_trained(
    model: nn.Module, recipe: dict[str, Any], epochs: int, given: argparse.Namespace, name: str
) -> nn.Module:
    """The network after the recipe's training; checkpoints lie under the work folder."""
    data = Cifar10(given.data, train_images=TRAIN, val_images=HELD_OUT)
    return trained(model, recipe, epochs, data, given.work / name, SEED)


def answers(model: nn.Module, data: Cifar10) -> tuple[Tensor, Tensor]:
    """Whether each held-out and each test image is classified rightly, in float32."""
    model.float().eval()
    found = []
    for loader in (data.val_dataloader(), data.test_dataloader()):
        with torch.inference_mode():
            found.append(torch.cat([model(x).argmax(1) == y for x, y in loader]))
    return found[0], found[1]


def dense(given: argparse.Namespace) -> nn.Module:
    """The network that is compressed: trained from nothing, once."""
    model = ResNet(N).to(memory_format=torch.channels_last)
    file = given.work / "dense.pt"
    if not file.exists():
        trained_model = row_trained(model, FROM_SCRATCH, given.dense_epochs, given, "dense")
        torch.save(trained_model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    return model


def slimkit_(model: nn.Module, given: argparse.Namespace, **sections: Any) -> nn.Module:
    """Pruned during the training as the default recipe says; `sections` change it."""
    recipe = {"prune": {"target": {"flops": TARGET}}, "optimizer": {"lr": given.lr}, **sections}
    return row_trained(model, recipe, given.epochs, given, given.variant)


def torch_pruning(model: nn.Module, given: argparse.Namespace) -> nn.Module:
    """Cut at once by Torch-Pruning's group-norm pruner, then fine-tuned plainly."""
    import torch_pruning as tp

    x = torch.zeros(1, 3, 32, 32)
    pruner = tp.pruner.GroupNormPruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        iterative_steps=400,
        pruning_ratio=1.0,
        max_pruning_ratio=0.95,
        ignored_layers=[model.linear],
    )
    whole = tp.utils.count_ops_and_params(model, x)[0]
    while tp.utils.count_ops_and_params(model, x)[0] > TARGET * whole:
        pruner.step()
    recipe = {"distill": False, "optimizer": {"lr": given.lr}}
    return row_trained(model, recipe, given.epochs, given, given.variant)


VARIANTS: dict[str, Callable[[nn.Module, argparse.Namespace], nn.Module]] = {
    "dense": lambda model, _given: model,
    "slimkit, defaults": slimkit_,
    "Torch-Pruning, group norm": torch_pruning,
    "slimkit, no distillation": lambda m, g: slimkit_(m, g, distill=False),
    "slimkit, lamp": lambda m, g: slimkit_(
        m, g, prune={"target": {"flops": TARGET}, "criterion": "lamp"}
    ),
}


def row_of(given: argparse.Namespace) -> Row:
    """Train and test one variant, or read what was found before."""
    file = given.work / f"{given.variant}.json"
    if file.exists():
        found: Row = json.loads(file.read_text())
        return found
    begin = time.perf_counter()
    model = VARIANTS[given.variant](dense(given), given)
    seconds = time.perf_counter() - begin
    data = Cifar10(given.data, train_images=TRAIN, val_images=HELD_OUT)
    held, test = answers(model, data)
    row = {
        "macs": macs(model.eval(), (torch.zeros(1, 3, 32, 32),)),
        "params": sum(p.numel() for p in model.parameters()),
        "held": held.tolist(),
        "test": test.tolist(),
        "minutes": seconds / 60,
    }
    file.write_text(json.dumps(row))
    return row


def table(rows: dict[str, Row], given: argparse.Namespace) -> str:
    """A Markdown table: accuracies, and differences from dense on the same images."""
    first = rows["dense"]
    base = torch.tensor(first["held"], dtype=torch.float64)
    lines = [
        "| network | MACs | fewer | params | held out | against dense | test | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        held = torch.tensor(row["held"], dtype=torch.float64)
        test = torch.tensor(row["test"], dtype=torch.float64)
        apart = held - base
        error = float(apart.std()) / math.sqrt(len(held))
        versus = "" if name == "dense" else f"{apart.mean():+.2%} ± {error:.2%}"
        lines.append(
            f"| {name} | {row['macs'] / 1e6:.1f} M | {first['macs'] / row['macs']:.2f}x | "
            f"{row['params'] / 1e3:.0f} k | {held.mean():.2%} | {versus} | {test.mean():.1%} | "
            f"{row['minutes']:.0f} |"
        )
    note = (
        f"ResNet-56, trained on {TRAIN:,} images for {given.dense_epochs} epochs (dense), then "
        f"{given.epochs} epochs for each row below it, pruning included; last epoch, seed {SEED}, "
        f"SGD, learning rate {given.lr} with cosine, bf16. Top-1 in float32 on {HELD_OUT:,} images "
        "held out, with the paired difference and its standard error, and on 1,000 test images. "
        f"Minutes on a machine shared with other work ({machine('torch', 'torch-pruning')})."
    )
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    """Train what is missing, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the data folder")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and rows")
    parser.add_argument("--variants", default=";".join(list(VARIANTS)[:4]))
    parser.add_argument("--dense-epochs", type=int, default=14)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    given.work.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in given.variants.split(";"):
        given.variant = name
        rows[name] = row_of(given)
    found = table(rows, given)
    print(found)
    if given.output is not None:
        given.output.write_text(found)


if __name__ == "__main__":
    main()
