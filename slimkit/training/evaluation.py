"""Measures the task's own metric of anything callable: a module, a simulation, a deployed file."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger

from slimkit.errors import SlimkitError, did_you_mean
from slimkit.evaluating import replaced
from slimkit.recipe import Metric
from slimkit.training.classification import network_of
from slimkit.training.copies import own_copy
from slimkit.training.entering import overrides, positional

_GOOD = frozenset(
    {"acc", "accuracy", "top1", "top5", "ap", "map", "f1", "fbeta", "iou", "miou", "auc", "auroc"}
    | {"dice", "psnr", "ssim", "precision", "recall", "r2", "bleu", "rouge", "kappa", "mcc"}
)
_BAD = frozenset(
    {"loss", "error", "err", "mse", "rmse", "msle", "mae", "mape", "smape", "nll", "brier", "wer"}
    | {"cer", "eer", "ece", "bce", "ce", "kl", "perplexity", "ppl", "epe", "fid"}
)
"""Words that the names of metrics are made of, where more is better, or less."""
_WORD = re.compile(r"[a-z]+\d*")


class Evaluator:
    """Runs the validation step of a LightningModule with its network's forward replaced.

    Args:
        inner: the user's LightningModule; copied.
        loader: batches to evaluate on.
        metric: which metric; None chooses the first that reads like an accuracy.
        path: of the part that is replaced, as a recipe's ``network``.
        gated: whether it matters which way is better.
        data: where the loader is from.
    """

    def __init__(
        self,
        inner: pl.LightningModule,
        loader: Any,
        metric: Metric | None,
        path: str | None = None,
        *,
        gated: bool = False,
        data: Any = None,
    ) -> None:
        self.gated, self.data = gated, data
        self.inner = inner
        self.loader = loader
        self.metric = metric
        self.path = path

    @property
    def can(self) -> bool:
        """Whether the module measures anything."""
        return overrides(self.inner, "validation_step")

    @property
    def why_not(self) -> str:
        """The reason where it does not."""
        return f"{type(self.inner).__name__} has no validation_step"

    def __call__(self, forward: Callable[..., Any]) -> float:
        """The metric over all batches, computed by `forward`.

        Raises:
            SlimkitError: there is no validation step, it never calls the forward, or it does not
                log the metric.
        """
        probe = own_copy(self.inner).cpu().float()
        network = network_of(probe, self.path)
        calls = 0

        def compressed(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(*positional(network, args, kwargs))

        with muted(), replaced(network, compressed):
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                logger=DummyLogger(),  # validation steps may log pictures
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            if isinstance(self.data, pl.LightningDataModule):
                trainer.datamodule = self.data  # type: ignore[attr-defined]  # steps may ask for it
            with torch.no_grad():
                trainer.validate(probe, dataloaders=self.loader, verbose=False)
        if not calls:
            raise SlimkitError(
                f"{type(self.inner).__name__}.validation_step never calls the module itself, so a "
                "deployed file cannot be evaluated: write self(x) there and move what it calls "
                "into forward"
            )
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.metric is None:
            self.metric = _choose(logged, self.gated)
        if self.metric.name not in logged:
            raise SlimkitError(
                f"metric: validation logs no {self.metric.name!r}"
                + did_you_mean(self.metric.name, logged)
            )
        return logged[self.metric.name]


def _choose(logged: dict[str, float], gated: bool) -> Metric:
    """The first metric of which more is better, else the first of which less is, else the first.

    Raises:
        SlimkitError: nothing is logged, or no name tells which way is better, and a gate asks.
    """
    words = {name: set(_WORD.findall(name.lower())) for name in logged}
    for name, found in words.items():
        if found & _GOOD and not found & _BAD:
            return Metric(name=name)
    for name, found in words.items():
        if found & _BAD:
            return Metric(name=name, mode="min")
    if logged and not gated:
        return Metric(name=next(iter(logged)))
    if logged:
        raise SlimkitError(
            f"metric: {', '.join(logged)} may be better for being more or less: say which, as in "
            f"metric: {{name: {next(iter(logged))}, mode: max}}"
        )
    raise SlimkitError("the validation step logs no metric; log one, such as val_accuracy")


@contextmanager
def muted() -> Iterator[None]:
    """Inside, Lightning's notices about hardware and its advice on workers are not printed."""
    loggers = [logging.getLogger(n) for n in ("pytorch_lightning", "lightning.pytorch")]
    rank_zero = [logging.getLogger("pytorch_lightning.utilities.rank_zero")]
    levels = {log: log.level for log in loggers + rank_zero}
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning.*")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)
