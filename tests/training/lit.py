"""A LightningModule as public projects write them, and data for it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from nets import normal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


def network(wide: int = 1) -> nn.Module:
    """Two convolutions with batch-norm and a classifier of 4, always with the same weights."""
    a, b = 8 * wide, 12 * wide
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, a, 3, padding=1, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.Conv2d(a, b, 3, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(b, 4),
        )


def macs_by_hand(net: nn.Module) -> int:
    """Multiply-accumulates of `network` on an 8x8 image, from its layers' own shapes."""
    first, second, linear = net[0].weight, net[3].weight, net[8].weight
    return 64 * (first.numel() + second.numel()) + linear.numel()


class Lit(pl.LightningModule):
    """Counts its hooks; everything else is as in Lightning's own examples."""

    def __init__(self, lr: float = 0.05, optimizer: str = "sgd", wide: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network(wide)
        self.criterion = nn.CrossEntropyLoss()
        self.val_acc = MulticlassAccuracy(4)
        self.events: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.last_validation = logits
        self.val_acc(logits, y)
        self.log("val_acc", self.val_acc)
        self.log("val_loss", self.criterion(logits, y))

    def configure_optimizers(self) -> Any:
        if self.hparams.optimizer == "sgd":
            made: torch.optim.Optimizer = torch.optim.SGD(
                self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=1e-2
            )
        else:
            made = torch.optim.AdamW(self.parameters(), self.hparams.lr / 10, amsgrad=True)
        schedule = torch.optim.lr_scheduler.StepLR(made, 2, gamma=0.9)
        return {"optimizer": made, "lr_scheduler": schedule}

    def configure_callbacks(self) -> Any:
        events = self.events

        class Count(pl.Callback):
            def on_train_epoch_start(self, *args: Any) -> None:
                events.append("callback")

        return Count()

    def setup(self, stage: str) -> None:
        self.events.append("setup")

    def on_fit_start(self) -> None:
        self.events.append("on_fit_start")

    def on_train_start(self) -> None:
        self.events.append("on_train_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.events.append(f"on_train_batch_start {batch_idx}")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.events.append("on_before_optimizer_step")

    def on_after_backward(self) -> None:
        self.events.append("on_after_backward")

    def on_train_epoch_end(self) -> None:
        self.events.append("on_train_epoch_end")

    def on_validation_epoch_end(self) -> None:
        self.events.append("on_validation_epoch_end")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.events.append("on_save_checkpoint")

    def on_fit_end(self) -> None:
        self.events.append("on_fit_end")

    def teardown(self, stage: str) -> None:
        self.events.append("teardown")


class Manual(Lit):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.criterion(self(batch[0]), batch[1]))
        optimizer.step()


class Batches(pl.LightningDataModule):
    """32 images of 4 classes to train on, in a fixed order, in batches of 8; 8 to validate."""

    def __init__(self) -> None:
        super().__init__()
        labels = torch.arange(40) % 4
        images = normal(40, 3, 8, 8) + normal(4, 3, 1, 1, seed=1)[labels]
        self.train = TensorDataset(images[:32], labels[:32])
        self.val = TensorDataset(images[32:], labels[32:])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 8)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, 8)


def fit(module: pl.LightningModule, data: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    """A trainer that has fitted `module` on the CPU, quietly."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    if any(type(c).__name__ == "ModelCheckpoint" for c in options.get("callbacks", ())):
        quiet["enable_checkpointing"] = True
    trainer = pl.Trainer(**{**quiet, **options})
    trainer.fit(module, datamodule=data or Batches(), ckpt_path=ckpt_path)
    return trainer
