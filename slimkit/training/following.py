"""Writes to the trainer's loggers what pruning did, each time that it did something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def log_pruning(
    trainer: pl.Trainer, network: nn.Module, sparsity: Mapping[str, float], macs_left: float
) -> None:
    """Log ``slimkit/sparsity/<layer>``, ``slimkit/macs_left`` and histograms of all gammas.

    Histograms go to loggers whose experiment has ``add_histogram``, as TensorBoard's has, under
    ``slimkit/gamma/<batch-norm>``.

    Args:
        trainer: with any loggers, or none.
        network: whose batch-norms are looked at.
        sparsity: name to the fraction of channels, or of weights, that is zero.
        macs_left: fraction of the dense model's multiply-accumulates.
    """
    metrics = {f"slimkit/sparsity/{name}": value for name, value in sparsity.items()}
    norms = {n: m for n, m in network.named_modules() if isinstance(m, _BatchNorm) and m.affine}
    for logger in trainer.loggers:
        logger.log_metrics({"slimkit/macs_left": macs_left, **metrics}, trainer.global_step)
        experiment: Any = getattr(logger, "experiment", None)
        if not hasattr(experiment, "add_histogram"):
            continue
        for name, norm in norms.items():
            gammas = norm.weight.detach().float().cpu()
            experiment.add_histogram(f"slimkit/gamma/{name}", gammas, trainer.global_step)
