"""Finds the averaged copies of a module that callbacks keep (EMA, stochastic weight averaging)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl
from torch import nn

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


def averages_of(module: SlimModule, trainer: pl.Trainer) -> list[nn.Module]:
    """The networks in all copies of `module` that the trainer's callbacks hold as attributes.

    Lightning's WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging keep one. What
    happens to the network's channels must happen to its average's, or neither fits the other.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set elsewhere
    held = [value for callback in callbacks for value in vars(callback).values()]
    copies: dict[int, nn.Module] = {}
    for value in held:
        for part in value.modules() if isinstance(value, nn.Module) else ():
            if isinstance(part, type(module)) and part is not module:
                copies[id(part)] = part.network
    return [*copies.values()]
