"""Accuracy right after a one-shot cut, criterion by criterion: nothing trained.

    PYTHONPATH=.:benchmarks python benchmarks/criteria.py --data ../shared/data \
        --output benchmarks/criteria.md

ResNet-56 on CIFAR-10 (its plot lies beside the table, with .png in place of .md) and MobileNetV1
0.25 on ImageNet classes, pretrained. Scores that need data
see 8 batches, batch-norm 20; both are training images, never those of the test. Random scores are
drawn with three seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch
from cifar10.data import Cifar10
from plots import accuracies
from rich.progress import track
from tasks import Task, imagenet_labelled, task
from torch import Tensor
from zoo.rows import machine

import slimkit
from slimkit.registry import discover

Batches = list[tuple[Tensor, Tensor]]
TARGETS = {"resnet56": (0.7, 0.5, 0.3), "mobilenet_v1": (0.8,)}
SEEDS = (0, 1, 2)  # of random scores


def names() -> list[str]:
    """Every criterion, `activation` by both of its statistics."""
    found = [p.name for p in discover().plugins if p.kind == "criterion"]
    found.insert(found.index("activation") + 1, "activation: apoz")
    return found


def criterion(name: str, seed: int) -> object:
    """An instance; `seed` is that of random scores."""
    plugin, _, statistic = name.partition(": ")
    options: dict[str, object] = {"statistic": statistic} if statistic else {}
    if plugin == "random":
        options = {"seed": seed}
    return discover().create("criterion", plugin, options)


def batches(network: str, data: str) -> Batches:
    """20 batches of 128 or, of the ImageNet sample, 16 of 16, with labels."""
    if network == "mobilenet_v1":
        images, labels = imagenet_labelled(data)
        return list(zip(images.split(16), labels.split(16), strict=True))
    loader = Cifar10(data, train_images=2560, augment=False).train_dataloader()
    return [(x, y) for x, y in loader]


def accuracy(t: Task, given: Batches, name: str, target: float, seed: int) -> tuple[float, float]:
    """Top-1 of the cut network and the seconds that pruning took."""
    begin = time.perf_counter()
    small = slimkit.prune(
        t.model, t.example, criterion(name, seed), target={"flops": target}, data=given
    )
    taken = time.perf_counter() - begin
    return t.of(small.eval()), taken


def main() -> None:
    """Prune, test, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the data folder")
    parser.add_argument("--networks", default=",".join(TARGETS))
    parser.add_argument("--criteria", default=",".join(names()))
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = []
    for network in given.networks.split(","):
        t, data = task(network, given.data), batches(network, given.data)
        dense = t.of(t.model)
        targets = TARGETS[network]
        found: dict[str, list[float]] = {}
        heads = [f"{target:.0%} of the MACs" for target in targets]
        lines += [f"{network}, dense {dense:.1%}:", "", f"| criterion | {' | '.join(heads)} | s |"]
        lines += [f"| --- |{' ---: |' * (len(heads) + 1)}"]
        for name in track(given.criteria.split(","), network):
            cells, seconds = [], []
            for target in targets:
                tries = [
                    accuracy(t, data, name, target, seed)
                    for seed in (SEEDS if name == "random" else SEEDS[:1])
                ]
                found.setdefault(name, []).append(statistics.mean(top for top, _ in tries))
                cells.append(f"{found[name][-1]:.1%}")
                seconds += [taken for _, taken in tries]
            lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(seconds):.1f} |")
            print(lines[-1], flush=True)
        lines.append("")
        if len(targets) > 1 and given.output is not None:
            plot = given.output.with_suffix(".png")
            accuracies(plot, {f"{network}, cut at once": found}, targets)
            lines += [f"![accuracy]({plot.name})", ""]
    lines += [
        "Top-1 accuracy on 1,000 test images; one standard error is 1.6 points and less, smaller "
        f"between rows. Random: the mean of {len(SEEDS)} seeds ({machine('torch')}).",
        "",
    ]
    print("\n".join(lines))
    if given.output is not None:
        given.output.write_text("\n".join(lines))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
