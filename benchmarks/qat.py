"""What training on integers gains: ResNet-20 on CIFAR-10 with weights of 4, 3 and 8 bits.

OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/qat.py --output benchmarks/qat.md

The pretrained network (91.5 %) is quantized for ONNX Runtime after training (PTQ), and trained on
the simulated integers for two epochs on 4,096 of its own training images (QAT), with ranges that
are observed (minmax, percentile) and learned (lsq). Activations have 8 bits. Accuracies are those
of the exported files on the 1,000 test images, after the last epoch. `float` is the network trained
as long without rounding, and exported in float. The variable SLIMKIT_DATA names the data folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import tempfile
import time
import warnings
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

import slimkit
from benchmarks.cifar10.data import Cifar10
from benchmarks.cifar10.models import pretrained_resnet20
from slimkit import SlimModule
from slimkit.quantization.fake import QuantizedModel

KINDS = {"minmax, percentile": ("minmax", "percentile"), "lsq": ("lsq", "lsq")}
BACKEND = "onnxruntime"


def data(images: int) -> Cifar10:
    """The first training images, augmented, always in the same order."""
    return Cifar10(train_images=images, val_images=1000)


def trained(quantize: dict[str, Any] | None, epochs: int, images: int) -> SlimModule:
    """The pretrained network after `epochs` more, on integers where `quantize` says how."""
    pl.seed_everything(0, verbose=False)
    recipe = {
        "task": "classification",
        "distill": False,
        "optimizer": {"name": "sgd", "lr": 0.01},
        "export": [BACKEND],
    }
    if quantize is not None:
        recipe["quantize"] = {**quantize, "train_from": 0.0, "freeze_batchnorm_at": 0.75}
    module = SlimModule(pretrained_resnet20(), recipe)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data(images))
    return module


def accuracy(model: nn.Module, folder: str) -> float:
    """Share of the test images that the exported file gets right."""
    batches = list(data(1).test_dataloader())
    artifact = slimkit.export(
        model.eval(), batches[0][0][:1], BACKEND, directory=Path(folder) / str(time.time_ns())
    )
    right = sum(int((artifact.run(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def main() -> None:
    """Measure, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 8])
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    lines = [
        "| weights | ranges | PTQ | QAT | seconds of QAT |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        before = accuracy(pretrained_resnet20(), folder)
        begin = time.perf_counter()
        after = trained(None, given.epochs, given.images)
        seconds = time.perf_counter() - begin
        row = f"| float | | {before:.1%} | {accuracy(after.network, folder):.1%} | {seconds:.0f} |"
        print(row, flush=True)
        lines.append(row)
        calibration = list(islice(data(given.images).train_dataloader(), 16))
        for bits in given.bits:
            for name, (weights, activations) in KINDS.items():
                ptq = slimkit.quantize(
                    pretrained_resnet20(),
                    calibration,
                    BACKEND,
                    weights=weights,
                    activations=activations,
                    weight_bits=bits,
                )
                options = {"weights": weights, "activations": activations, "weight_bits": bits}
                begin = time.perf_counter()
                module = trained(options, given.epochs, given.images)
                seconds = time.perf_counter() - begin
                assert module.fake is not None
                qat = QuantizedModel(module.network, module.fake, BACKEND)
                row = (
                    f"| {bits} bits | {name} | {accuracy(ptq, folder):.1%} | "
                    f"{accuracy(qat, folder):.1%} | {seconds:.0f} |"
                )
                print(row, flush=True)
                lines.append(row)
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "onnxruntime"))
    note = (
        f"Top-1 accuracy of the exported files on 1,000 test images (one standard error is 0.9 "
        f"points); QAT: {given.epochs} epochs on {given.images:,} images, SGD, learning rate 0.01, "
        f"seed 0. Weights of fewer than 8 bits are stored and computed as int8: these files are "
        f"no smaller and no faster. {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{packages}."
    )
    table = "\n".join([*lines, "", note, ""])
    if given.output is not None:
        given.output.write_text(table)


if __name__ == "__main__":
    main()
