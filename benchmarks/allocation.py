"""How a target is shared out over the groups: evenly, by one ranking, or by measured sensitivity.

    PYTHONPATH=.:benchmarks python benchmarks/allocation.py --data ../shared/data \
        --output benchmarks/allocation.md

Pretrained ResNet-20 and ResNet-56 on CIFAR-10, cut at once, batch-norm re-estimated, not trained.
`uniform` takes the same share of each group's channels (`ranking: local`), `isomorphic` the same of
each structure, `global` what scores least anywhere, and `sensitivity` what `slimkit sensitivity`
measured on validation images says costs least. The criterion orders the channels of a group in all
four. The plot lies beside the table, with .png in place of .md.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from cifar10.data import Cifar10
from plots import accuracies
from rich.progress import track
from tasks import Task, task
from zoo.rows import machine

from slimkit.batchnorm import reestimate_
from slimkit.pruning.prune import cut_to_target_
from slimkit.pruning.targets import Target
from slimkit.recipe import Recipe
from slimkit.training.module import SlimModule
from slimkit.training.pruning import coupling_of, scores_of, selector_of
from slimkit.training.pruning_scan import curves_of

SHARES = (0.7, 0.5, 0.3)
RANKINGS = {"uniform": "local", "isomorphic": "isomorphic", "global": "global"}
KINDS = (*RANKINGS, "sensitivity")


def recipe(criterion: str, kind: str, share: float) -> Recipe:
    """A recipe that prunes to `share` of the multiply-accumulates."""
    prune: dict[str, object] = {"criterion": criterion, "target": {"flops": share}, "round_to": 1}
    if kind == "sensitivity":
        prune["ratios"] = "sensitivity"
    else:
        prune["ranking"] = RANKINGS[kind]
    return Recipe.model_validate({"task": "classification", "distill": False, "prune": prune})


def measured(t: Task, data: Cifar10, criterion: str, images: int) -> list[object]:
    """The curves of a scan on validation images."""
    module = SlimModule(t.model, recipe(criterion, "sensitivity", 0.5))
    with tempfile.TemporaryDirectory() as folder:
        return list(curves_of(module, data, Path(folder), samples=images, say=print))


def accuracy(
    t: Task, data: Cifar10, criterion: str, kind: str, share: float, curves: list[object]
) -> float:
    """Top-1 on the test images of the network cut to `share`."""
    what = recipe(criterion, kind, share)
    assert what.prune is not None
    module = SlimModule(t.model, what)
    network, section, inputs = module.network.eval(), what.prune, (t.example,)
    coupling = coupling_of(network, inputs, section)
    selector = selector_of(network, coupling, inputs, section, (), curves)
    batches = list(data.train_dataloader())
    scores = scores_of(module.inner, network, coupling, section, batches)
    cut_to_target_(network, selector, scores, Target("flops", share), inputs)
    reestimate_(network, batches, section.batchnorm_batches)
    return t.of(network.eval())


def main() -> None:
    """Scan, cut, test, print a Markdown table, write it and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the data folder")
    parser.add_argument("--networks", default="resnet20,resnet56")
    parser.add_argument("--criteria", default="l1,lamp")
    parser.add_argument("--images", type=int, default=2000, help="that a scan measures on, at most")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    data = Cifar10(given.data, train_images=2560, augment=False)
    lines = [
        f"| network | criterion | shared out | {' | '.join(f'{s:.0%}' for s in SHARES)} |",
        f"| --- | --- | --- |{' ---: |' * len(SHARES)}",
    ]
    panels: dict[str, dict[str, list[float]]] = {}
    for name in given.networks.split(","):
        t = task(name, given.data)
        for criterion in given.criteria.split(","):
            curves = measured(t, data, criterion, given.images)
            for kind in track(KINDS, f"{name}, {criterion}"):
                found = [accuracy(t, data, criterion, kind, share, curves) for share in SHARES]
                panels.setdefault(f"{name}, {criterion}", {})[kind] = found
                cells = " | ".join(f"{value:.1%}" for value in found)
                lines.append(f"| {name} | {criterion} | {kind} | {cells} |")
                print(lines[-1], flush=True)
    lines += [
        "",
        "Top-1 accuracy on 1,000 test images at three shares of the multiply-accumulates, cut at "
        "once, batch-norm re-estimated on 20 batches, not trained. One standard error is 1.6 "
        f"points and less, smaller between rows. Scans use up to {given.images:,} of the 5,000 "
        f"validation images ({machine('torch')}).",
        "",
    ]
    print("\n".join(lines))
    if given.output is not None:
        plot = given.output.with_suffix(".png")
        accuracies(plot, panels, SHARES)
        given.output.write_text("\n".join([*lines, f"![accuracy]({plot.name})", ""]))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
