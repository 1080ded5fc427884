"""What Lightning's strategies must be for a network that changes while it trains."""

from __future__ import annotations

import gc

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher

from slimkit.errors import SlimkitError


def refuse_copies(trainer: pl.Trainer, doing: str) -> None:
    """Refuse strategies that train in copies of this process.

    Raises:
        SlimkitError: it is such a one.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise SlimkitError(
            f"{doing} works with DDP as processes of their own, not as copies of this one "
            "(ddp_spawn, ddp_fork, ddp_notebook), from which weights of another shape do not come "
            "back: use strategy: ddp"
        )


def check_strategy(trainer: pl.Trainer, doing: str, instead: str) -> None:
    """Refuse strategies under which a process does not hold whole weights.

    Args:
        trainer: that will train.
        doing: what is asked for, such as "pruning while training".
        instead: what else the user may do.

    Raises:
        SlimkitError: it is neither one device nor DDP.
    """
    strategy = trainer.strategy
    refuse_copies(trainer, doing)
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        raise SlimkitError(
            f"{doing} works on one device or with DDP, not with {type(strategy).__name__}, under "
            f"which a process does not hold whole weights: use strategy: ddp, or {instead}"
        )


def rewrap_(trainer: pl.Trainer) -> None:
    """Let DDP meet the module's parameters anew, after their shapes have changed.

    DDP copies gradients into buckets whose sizes it fixes when it wraps a module, and its hooks
    hold on to autograd nodes that know the old shapes. It is taken apart and built again, with the
    strategy's own arguments and communication hook. All processes must call this.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or strategy.model is strategy.lightning_module:
        return
    strategy.model = strategy.lightning_module
    gc.collect()  # the old one's hooks go with it
    strategy.configure_ddp()
