"""A training of minutes to hours that says where it is and goes on where it was killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from cifar10.data import Cifar10
from torch import nn

from slimkit import SlimModule


class Epochs(pl.Callback):
    """Prints one line per epoch.

    Args:
        name: in front of it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.begin = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Say where the training is."""
        if not trainer.sanity_checking:
            seconds = time.perf_counter() - self.begin
            accuracy = float(trainer.callback_metrics["val_accuracy"])
            epoch = trainer.current_epoch + 1
            print(f"{self.name}: epoch {epoch}, {accuracy:.2%}, {seconds:.0f} s", flush=True)


def precision() -> str:
    """What Lightning trains fastest in here: bf16-mixed where the processor multiplies it."""
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # torch has no public name for it
    return "bf16-mixed" if fast else "32-true"


def trained(
    model: nn.Module,
    recipe: dict[str, Any],
    epochs: int,
    data: Cifar10,
    folder: Path,
    seed: int,
    every: int = 1,
) -> nn.Module:
    """The network after the recipe's training on the processor, in bf16 where that is fast.

    Args:
        model: a classifier.
        recipe: without its task.
        epochs: how many.
        data: to train and validate on.
        folder: of checkpoints; its name stands in front of each line.
        seed: of all random numbers.
        every: epochs from one validation to the next; training does not hang on it.
    """
    pl.seed_everything(seed, verbose=False)
    module = SlimModule(model, {"task": "classification", **recipe})
    kept = pl.callbacks.ModelCheckpoint(folder, save_last=True, save_top_k=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision=precision(),
        check_val_every_n_epoch=every,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[kept, Epochs(folder.name)],
    )
    trainer.fit(module, datamodule=data, ckpt_path="last")
    return module.network.eval()
