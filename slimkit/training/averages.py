"""Finds the averaged copies of a module: those of callbacks, and those that teach it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from torch import nn

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


def averages_of(module: SlimModule, trainer: pl.Trainer | None) -> list[nn.Module]:
    """The networks in all `copies_of` the module, and of its teachers those that average it.

    What happens to the network's channels must happen to its average's, or neither fits the other.
    """
    copies = [] if trainer is None else copies_of(module, trainer)
    return [*(copy.network for copy in copies), *module.averaging_teachers]


def copies_of(module: SlimModule, trainer: pl.Trainer) -> list[SlimModule]:
    """The copies of `module` that the trainer's callbacks hold as attributes.

    Lightning's WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging keep one, and go
    through its parameters and buffers in step with the module's.
    """
    copies: dict[int, SlimModule] = {}
    for value in held_by_callbacks(trainer):
        for part in value.modules() if isinstance(value, nn.Module) else ():
            if isinstance(part, type(module)) and part is not module:
                copies[id(part)] = part
    return [*copies.values()]


def held_by_callbacks(trainer: pl.Trainer) -> list[Any]:
    """All attributes of the trainer's callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set elsewhere
    return [value for callback in callbacks for value in vars(callback).values()]
