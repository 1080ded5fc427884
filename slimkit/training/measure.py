"""Chooses what a sensitivity scan measures on a LightningModule's validation batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from slimkit.errors import SlimkitError
from slimkit.pruning.sensitivity import Divergence, LossIncrease, Measure
from slimkit.training.classification import Classification
from slimkit.training.entering import Entry, overrides
from slimkit.training.logged import logged


def measure_of(entry: Entry, batch: Any, say: Callable[[str], None]) -> Measure:
    """The increase of the validation loss, or of the outputs' divergence where there is none.

    The loss is what a recipe is about, and what an allocation has to keep small; it is the
    cross-entropy of each sample with ``task: classification``, else the mean of each batch that
    the module's own validation_step returns, or logs under a name with "loss" in it. A module that
    does neither (a detector that only collects its average precision) still has outputs.

    Args:
        entry: to the network of the module; what that logs is thrown away.
        batch: a validation batch, on the module's device, to try it on.
        say: told why it is not the loss.
    """
    inner = entry.inner
    if entry.whole and isinstance(inner, Classification):
        return LossIncrease(lambda batch: cross_entropies(inner, batch))
    reason = "has no validation_step"
    if overrides(inner, "validation_step"):
        steps = ValidationLoss(inner)
        try:
            with torch.no_grad():
                steps(batch)
            return LossIncrease(steps)
        except NoLoss:
            reason = "neither returns nor logs a loss in its validation_step"
        except Exception as error:
            if isinstance(error, SlimkitError):
                raise
            reason = f"fails in validation_step ({type(error).__name__}: {error})"
    say(
        f"{type(inner).__name__} {reason}: the scan measures how far the outputs are from the "
        "dense model's"
    )
    return Divergence(entry.network, entry)


def cross_entropies(module: Classification, batch: Any) -> Tensor:
    """Cross-entropy of each sample (samples,), in nats."""
    logits, labels = module._predict(batch)
    return functional.cross_entropy(logits, labels, reduction="none")


class NoLoss(Exception):
    """The validation step gives no loss."""


class ValidationLoss:
    """The loss that a LightningModule's validation step returns or logs.

    Args:
        inner: what it logs in the step goes nowhere else.
    """

    def __init__(self, inner: pl.LightningModule) -> None:
        self.inner = inner
        self.logged: dict[str, Any] = {}
        parameters = list(inspect.signature(inner.validation_step).parameters)
        self.arguments = (0,) * (len(parameters) - 1) if len(parameters) < 4 else (0,)

    def __call__(self, batch: Any) -> Tensor:
        """The mean loss of a batch, ()."""
        self.logged.clear()
        with logged(self.inner, self._take):
            out: Any = self.inner.validation_step(batch, *self.arguments)
        for module in self.inner.modules():
            if isinstance(module, Metric):  # some keep every batch that they have seen
                module.reset()
        found = out.get("loss") if isinstance(out, Mapping) else out
        if not (isinstance(found, Tensor) and found.numel() == 1):
            named = [name for name, value in self.logged.items() if "loss" in name.lower()]
            if not named:
                raise NoLoss
            found = self.logged[min(named, key=len)]
        return torch.as_tensor(found, dtype=torch.float64).reshape(())

    def _take(self, name: str, value: Any) -> None:
        if isinstance(value, float | int) or (isinstance(value, Tensor) and value.numel() == 1):
            self.logged[name] = value
