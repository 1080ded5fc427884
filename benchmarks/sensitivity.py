"""The sensitivity scan of pruning against the naive one: ResNet-20 on CIFAR-10.

PYTHONPATH=. python benchmarks/sensitivity.py --data FOLDER --output benchmarks/sensitivity.md

The naive scan runs the whole network on all validation images for every group and every ratio. It
is written down here once more, from nothing but the groups and the criterion's order of their
channels. Wall time is that of each scan from the loaded model and data to the numbers, analysis of
the groups included. With --images and --groups it takes a minute to try it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from cifar10.data import Cifar10
from cifar10.models import resnet20
from rich.progress import track
from torch import nn
from torch.nn import functional
from zoo.rows import machine

from benchmarks.folder import data_folder
from slimkit.pruning.coupling import Group
from slimkit.pruning.prune import analyse
from slimkit.pruning.scores import group_scores
from slimkit.pruning.sensitivity import RATIOS, Curve
from slimkit.registry import discover
from slimkit.training.module import SlimModule
from slimkit.training.pruning_scan import curves_of

CRITERION = "l1"


def fast(model: nn.Module, data: Cifar10, protect: list[str]) -> list[Curve]:
    """What `slimkit sensitivity` does."""
    prune = {"criterion": CRITERION, "target": {"flops": 0.5}, "protect": protect}
    module = SlimModule(model, {"task": "classification", "prune": prune, "distill": False})
    with tempfile.TemporaryDirectory() as folder:
        return curves_of(module, data, Path(folder), say=print)


def naive(model: nn.Module, data: Cifar10, protect: list[str]) -> dict[tuple[str, float], float]:
    """(group, ratio) -> mean validation loss without the channels, less that with them."""
    batches = list(data.val_dataloader())
    coupling = analyse(model, (batches[0][0][:1],), protect)
    scores = group_scores(model, coupling, discover().create("criterion", CRITERION))
    dense = mean_loss(model, batches)
    points = [(group, ratio) for group in coupling.groups for ratio in RATIOS]
    return {
        (group.name, ratio): mean_loss(without(model, group, scores[group.name], ratio), batches)
        - dense
        for group, ratio in track(points, "naive")
    }


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Cross-entropy, the mean over all images."""
    total = sum(float(functional.cross_entropy(model(x), y, reduction="sum")) for x, y in batches)
    return total / sum(len(y) for _, y in batches)


@torch.no_grad()
def without(model: nn.Module, group: Group, scores: torch.Tensor, ratio: float) -> nn.Module:
    """A copy whose lowest-scored channels of a group are zero in every layer."""
    small = copy.deepcopy(model)
    least = scores.argsort(descending=True, stable=True).flip(0)
    gone = set(least[: int(group.channels * ratio + 1e-6)].tolist())
    parameters = dict(small.named_parameters())
    for member in group.members:
        for position, channel in enumerate(member.channel.tolist()):
            if channel in gone and member.tensor in parameters:
                parameters[member.tensor].select(member.dim, position).zero_()
    return small


def ranks(values: list[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    found = np.asarray(values)
    below = (found[:, None] > found[None]).sum(1)
    same = (found[:, None] == found[None]).sum(1)
    return below + (same + 1) / 2


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation: 1 where both order the points alike."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def main() -> None:
    """Run both, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="the data folder; left out: the variable SLIMKIT_DATA")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--images", type=int, default=2000, help="validation images")
    parser.add_argument("--groups", type=int, help="only the first groups; left out: all")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    model = resnet20(str(data_folder(given.data) / "weights/cifar10_resnet20.safetensors")).eval()
    data = Cifar10(given.data, train_images=512, val_images=given.images)
    groups = analyse(model, (torch.zeros(1, 3, 32, 32),)).groups
    protect = [group.name for group in groups[given.groups :]] if given.groups else []
    begin = time.perf_counter()
    curves = fast(model, data, protect)
    middle = time.perf_counter()
    wanted = naive(model, data, protect)
    seconds = middle - begin, time.perf_counter() - middle
    points = {(c.group, p.ratio): p for c in curves for p in c.points}
    rho = spearman([points[key].increase for key in wanted], list(wanted.values()))
    share = sum(p.samples for p in points.values()) / (len(points) * given.images)
    lines = [
        "| scan | seconds | of the naive one | images of a point | Spearman's rho |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| slimkit | {seconds[0]:.1f} | {seconds[0] / seconds[1]:.3f} | "
        f"{share * given.images:.0f} (mean) | {rho:.4f} |",
        f"| naive | {seconds[1]:.1f} | 1 | {given.images} | 1 |",
        "",
        f"{len(points)} points: {len(curves)} groups of ResNet-20 at {len(RATIOS)} ratios, "
        f"{given.images} validation images of CIFAR-10, criterion {CRITERION} "
        f"({machine('torch')}, {torch.get_num_threads()} threads).",
        "",
    ]
    print("\n".join(lines))
    if given.output is not None:
        given.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
