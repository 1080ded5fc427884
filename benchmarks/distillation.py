"""What distillation is worth: a pruned ResNet-56 and a ResNet-20 on CIFAR-10, loss by loss.

    PYTHONPATH=.:benchmarks python benchmarks/distillation.py --data ../shared/data \
        --work runs/distillation --output benchmarks/distillation.md

Two tables. In the first, a ResNet-56 is pruned to 40 % of its multiply-accumulates with the
default recipe, with labels only and with each loss that bears other widths, taught by its dense
self. In the second, a ResNet-20 learns from nothing: from labels, from the pretrained ResNet-56 of
the data folder by each loss, and from several teachers. Rows of a table have the same data, seeds,
epochs and optimizer; every loss stands beside the labels' loss with the one weight that is written
here: kl's is the recipe's default, the others begin about as large as the labels' loss where a
ResNet-20 learns from nothing. None was tuned by any accuracy.

The dense network of the first table is trained on the 40,000 images in front of those held out. All
are tested after the last epoch on the last --held-out training images, which they never saw (the
second table's pretrained teachers did), and on the 1,000 test images. With --cached the second
table's images are not augmented, and what the pretrained teachers give is computed once and read
back in every epoch. (benchmarks/distillation.md was made in three runs, on two processors: with
--tables pruned --seeds 0 --images 10000 --epochs 4 --dense-epochs 10, and with --tables taught
--cached --seeds 0 --images 5000 --held-out 5000 --taught-epochs 18; its third table is the second
one again, with --tables taught --seeds 0 --images 20000 --held-out 10000 --taught-epochs 10
--variants "kl;dkd;kl from ResNet-56 and ResNet-20".) What is finished lies in
--work and is not made again; a killed run goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from cifar10.data import Cifar10
from cifar10.models import ResNet
from long_training import precision, trained
from torch import Tensor, nn
from zoo.rows import machine

from slimkit.pruning.cost import macs

TARGET = 0.4  # of the multiply-accumulates
LAYERS = ("layer1", "layer2", "layer3")
LABELS = "labels only"
DENSE_IMAGES = 40_000  # that the network to be pruned is trained on

Row = dict[str, Any]


def loss(name: str, at: Any = "output", weight: float = 1.0, **options: Any) -> dict[str, Any]:
    """One entry of a recipe."""
    return {"name": name, "at": at, "weight": weight, "options": options}


ANY_WIDTH = {  # losses that need not know the student's channels
    "kl": [loss("kl", weight=0.5, temperature=4.0)],
    "dkd": [loss("dkd", weight=0.2, alpha=1.0, beta=2.0, temperature=4.0)],
    "dist": [loss("dist", weight=0.5, inter=2.0, intra=2.0)],
    "bce-logits": [loss("bce-logits", weight=4.0)],
    "hint": [loss("hint", "layer3", 0.5)],
    "attention": [loss("attention", at, 100.0) for at in LAYERS],
    "rkd": [loss("rkd", weight=0.2, distance=25.0, angle=50.0)],
    "similarity": [loss("similarity", "layer3", 1000.0)],
    "pkt": [loss("pkt", "layer3", 500.0)],
    "crd": [loss("crd", "layer3", 0.4)],
}
SAME_WIDTH = {
    "feature-mse": [loss("feature-mse", "layer3", 0.5)],
    "cosine": [loss("cosine", "layer3", 3.0)],
    "cwd": [loss("cwd", "layer3", temperature=1.0)],
    "fsp": [
        loss("fsp", [["layer1", "layer2"]], 0.2),
        loss("fsp", [["layer2", "layer3"]], 0.2),
    ],
}
FADING = {"value": 2.0, "schedule": "linear", "to": 0.0}
RISING = {"value": 1.0, "schedule": "warm-up", "during": [0.0, 0.5]}


def pruned_variants(given: argparse.Namespace) -> dict[str, Any]:
    """Name to the distill section, for the first table."""
    wanted = {name: {"losses": losses} for name, losses in ANY_WIDTH.items()}
    wanted["kl, fading"] = {"losses": [{**ANY_WIDTH["kl"][0], "weight": FADING}]}
    wanted["kl from an average of itself"] = {"losses": ANY_WIDTH["kl"], "teacher": "ema"}
    wanted["kl + hint"] = {"losses": [*ANY_WIDTH["kl"], *ANY_WIDTH["hint"]]}
    return {LABELS: False, **_chosen(wanted, given)}


def taught_variants(given: argparse.Namespace) -> dict[str, Any]:
    """Name to the distill section, for the second table."""
    weights = Path(given.data) / "weights"
    one, two = (
        {
            "name": f"cifar10.models:{name}",
            "options": {"weights": str(weights / f"cifar10_{name}.safetensors")},
        }
        for name in ("resnet56", "resnet20")
    )
    wanted = {
        name: {"losses": losses, "teacher": one}
        for name, losses in {**ANY_WIDTH, **SAME_WIDTH}.items()
    }
    kl = {"losses": ANY_WIDTH["kl"]}
    wanted["kl, fading"] = {
        "losses": [{**ANY_WIDTH["kl"][0], "weight": FADING}],
        "label_weight": RISING,
        "teacher": one,
    }
    wanted["kl from ResNet-56 and ResNet-20"] = {**kl, "teacher": [one, two]}
    wanted["kl from both, by confidence"] = {
        **kl,
        "teacher": [one, two],
        "weighting": "confidence",
    }
    peer = {"name": "distillation:peer", "learns": True}
    wanted["kl with a peer"] = {"losses": [loss("kl", temperature=1.0)], "teacher": peer}
    wanted["kl from an average of itself"] = {**kl, "teacher": "ema"}
    return {LABELS: False, **_chosen(wanted, given)}


def peer() -> nn.Module:
    """A second ResNet-20 of other first weights, for mutual learning."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        return ResNet(3)


def _chosen(wanted: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Those named by --variants, or whose first word is among --losses."""
    if given.variants:
        named = given.variants.split(";")
        return {n: section for n, section in wanted.items() if n in named}
    names = given.losses.split(",") if given.losses else None
    first = {name: name.replace(",", " ").split()[0] for name in wanted}
    return {n: section for n, section in wanted.items() if names is None or first[n] in names}


def data_of(
    given: argparse.Namespace, seed: int, images: int | None = None, augment: bool = True
) -> Cifar10:
    """The first training images in an order of the seed, and those held out."""
    images, held = images or given.images, given.held_out
    return Cifar10(given.data, train_images=images, val_images=held, augment=augment, seed=seed)


def dense(given: argparse.Namespace) -> nn.Module:
    """The ResNet-56 that is pruned, trained once."""
    file, model = given.work / "dense9.pt", ResNet(9)
    if not file.exists():
        recipe = {"optimizer": {"name": "sgd", "lr": 0.1}, "distill": False}
        pl.seed_everything(9, verbose=False)
        model = ResNet(9).to(memory_format=torch.channels_last)
        data = data_of(given, 0, DENSE_IMAGES)
        model = trained(model, recipe, given.dense_epochs, data, given.work / "dense9-0", 0)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    return model


def network(table: str, section: Any, given: argparse.Namespace, name: str) -> nn.Module:
    """The trained network of a row, with the seed that ends its name."""
    seed = int(name.rpartition("-")[2])
    if table == "pruned":
        model, epochs = dense(given), given.epochs
        recipe = {"prune": {"target": {"flops": TARGET}}, "optimizer": {"lr": given.lr}}
    else:
        pl.seed_everything(seed, verbose=False)
        model, epochs = ResNet(3), given.taught_epochs
        recipe = {"optimizer": {"lr": 10 * given.lr}}
    model = model.to(memory_format=torch.channels_last)
    cached = given.cached and table == "taught"
    if cached and section and section["teacher"] != "ema" and "learns" not in section["teacher"]:
        section = {**section, "cache": str(given.work / "cache")}
    recipe["distill"] = section
    data = data_of(given, seed, augment=not cached)
    return trained(model, recipe, epochs, data, given.work / name, seed, every=5 if cached else 1)


def answers(model: nn.Module, data: Cifar10) -> tuple[Tensor, Tensor]:
    """Whether each held-out and each test image is classified rightly, in float32."""
    model.float().eval()
    found = []
    for loader in (data.val_dataloader(), data.test_dataloader()):
        with torch.inference_mode():
            found.append(torch.cat([model(x).argmax(1) == y for x, y in loader]))
    return found[0], found[1]


def row_of(table: str, variant: str, section: Any, seed: int, given: argparse.Namespace) -> Row:
    """Train and test one variant with one seed, or read what was found before."""
    plain = "".join(c if c.isalnum() else "_" for c in variant)
    name = f"{table}-{plain}-{seed}"
    file = given.work / f"{name}.json"
    if file.exists():
        found: Row = json.loads(file.read_text())
        return found
    begin = time.perf_counter()
    model = network(table, section, given, name)
    seconds = time.perf_counter() - begin
    held, test = answers(model, data_of(given, seed))
    row = {
        "macs": macs(model, (torch.zeros(1, 3, 32, 32),)),
        "held": held.int().tolist(),
        "test": test.int().tolist(),
        "minutes": seconds / 60,
    }
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(row))
    aside.replace(file)
    return row


def table_of(rows: dict[str, list[Row]]) -> str:
    """A Markdown table: accuracies, and differences from labels only on the same images."""
    base = torch.tensor([r["held"] for r in rows[LABELS]], dtype=torch.float64)  # (seeds, images)
    lines = [
        "| learns from | MACs | held out | against labels only | test | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in rows.items():
        held = torch.tensor([r["held"] for r in found], dtype=torch.float64)
        test = torch.tensor([r["test"] for r in found], dtype=torch.float64)
        apart = held - base
        per_image = apart.mean(0)
        over_images = float(per_image.std()) / math.sqrt(len(per_image))
        seeds = apart.mean(1)
        spread = float(seeds.std()) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
        error = math.hypot(over_images, spread)
        versus = "" if name == LABELS else f"{apart.mean():+.2%} ± {error:.2%}"
        lines.append(
            f"| {name} | {sum(r['macs'] for r in found) / len(found) / 1e6:.1f} M | "
            f"{held.mean():.2%} | {versus} | {test.mean():.1%} | "
            f"{sum(r['minutes'] for r in found) / len(found):.0f} |"
        )
    return "\n".join(lines)


def how(table: str, given: argparse.Namespace) -> str:
    """What the rows of a table were trained on."""
    if table == "pruned":
        return (
            f"{given.images:,} images, {given.epochs} epochs, pruning included, learning rate "
            f"{given.lr}; the dense network before: {DENSE_IMAGES:,} images, {given.dense_epochs} "
            "epochs."
        )
    return (
        f"{given.images:,} images{', not augmented' if given.cached else ''}, "
        f"{given.taught_epochs} epochs, learning rate {10 * given.lr:g}; the teachers are the "
        "pretrained networks of the data folder"
        f"{', whose outputs are read from a cache' if given.cached else ''}."
    )


TABLES = {
    "pruned": (
        f"## ResNet-56 pruned to {TARGET:.0%} of its MACs, taught by its dense self",
        pruned_variants,
    ),
    "taught": ("## ResNet-20 from nothing, taught by ResNet-56 and others", taught_variants),
}


def main() -> None:
    """Train what is missing, print Markdown tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the data folder")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and rows")
    parser.add_argument("--tables", default="pruned,taught")
    parser.add_argument("--losses", help="such as kl,hint; left out: all")
    parser.add_argument("--variants", help="rows, such as kl;kl + hint; left out: all of --losses")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=10, help="of the first table")
    parser.add_argument("--taught-epochs", type=int, default=20, help="of the second table")
    parser.add_argument("--dense-epochs", type=int, default=14)
    parser.add_argument("--images", type=int, default=40_000, help="to train on")
    parser.add_argument("--held-out", type=int, default=10_000, help="images to test on")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument(
        "--cached", action="store_true", help="the second table's teachers run once"
    )
    parser.add_argument("--output", type=Path, help="Markdown file for the tables")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    given.work.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    parts = []
    for table in given.tables.split(","):
        title, variants = TABLES[table]
        rows = {
            name: [row_of(table, name, section, seed, given) for seed in seeds]
            for name, section in variants(given).items()
        }
        parts += [title, table_of(rows), how(table, given)]
    parts.append(
        f"Last epoch, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, SGD with cosine, "
        f"{precision()}. Top-1 in float32 on {given.held_out:,} images held out and on 1,000 test "
        "images; differences are paired, with their standard error over images and seeds. Weights "
        "of the losses are those in benchmarks/distillation.py, not tuned. Minutes on a machine "
        f"shared with other work ({machine('torch')})."
    )
    found = "\n\n".join(parts) + "\n"
    print(found)
    if given.output is not None:
        given.output.write_text(found)


if __name__ == "__main__":
    main()
