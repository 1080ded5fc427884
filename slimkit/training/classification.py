"""The LightningModule around a plain classifier: loss, accuracy, optimizer, schedule."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from slimkit.errors import SlimkitError
from slimkit.parts import part_of
from slimkit.recipe import Optimizer


class Classification(pl.LightningModule):
    """Trains `model` with cross-entropy on batches of (inputs, labels).

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``test_accuracy`` (top-1, 0 to 1).

    Args:
        model: gives logits of shape (batch, classes).
        optimizer: which optimizer and learning-rate schedule.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self.model = model
        self.choice = optimizer

    def forward(self, *inputs: Any) -> Any:
        """Logits."""
        return self.model(*inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Cross-entropy of one batch."""
        logits, labels = self._predict(batch)
        loss = functional.cross_entropy(logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Loss and accuracy of one batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Loss and accuracy of one batch."""
        self._evaluate("test", batch)

    def configure_optimizers(self) -> Any:
        """The chosen optimizer, with linear warm-up and then cosine decay or none."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        c = self.choice
        optimizer: torch.optim.Optimizer
        if c.name == "sgd":
            optimizer = torch.optim.SGD(parameters, c.lr, c.momentum, weight_decay=c.weight_decay)
        else:
            optimizer = torch.optim.AdamW(parameters, c.lr, weight_decay=c.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        warm = max(1, round(c.warmup * steps))

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            if c.schedule == "constant":
                return 1.0
            done = min(1.0, (step - warm) / max(1, steps - warm))
            return 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise SlimkitError(
                "task classification wants batches of (inputs, labels), not "
                f"{type(batch).__name__}; write a LightningModule with your own training_step"
            )
        inputs, labels = batch
        logits = self(*inputs) if isinstance(inputs, list | tuple) else self(inputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise SlimkitError(
                f"task classification wants logits of shape (batch, classes), but the model gives "
                f"{got}; write a LightningModule with your own losses"
            )
        return logits, labels

    def _evaluate(self, part: str, batch: Any) -> None:
        logits, labels = self._predict(batch)
        self.log(f"{part}_loss", functional.cross_entropy(logits, labels), on_epoch=True)
        metric = getattr(self, f"{part}_metric", None)
        if metric is None:  # the number of classes is known from the first logits
            metric = MulticlassAccuracy(logits.shape[1], average="micro").to(logits.device)
            setattr(self, f"{part}_metric", metric)
        metric(logits, labels)
        name = f"{part}_metric"
        self.log(f"{part}_accuracy", metric, on_epoch=True, prog_bar=True, metric_attribute=name)


def network_of(inner: pl.LightningModule, path: str | None) -> nn.Module:
    """What is compressed: the plain model, or the LightningModule itself, or a part of it.

    Args:
        inner: the LightningModule.
        path: of the part, as a recipe's ``network``.

    Raises:
        SlimkitError: there is no such part.
    """
    return part_of(inner.model if isinstance(inner, Classification) else inner, path)


def lightning_of(model: nn.Module, optimizer: Optimizer) -> pl.LightningModule:
    """The model, if it trains itself, else a `Classification` around it.

    Args:
        model: a LightningModule, or a classifier.
        optimizer: for the latter.
    """
    return model if isinstance(model, pl.LightningModule) else Classification(model, optimizer)
