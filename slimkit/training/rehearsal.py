"""Computes distillation losses once on copies, before a long training that comes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from slimkit.errors import SlimkitError
from slimkit.recipe import Recipe
from slimkit.training.deployment import Loaders
from slimkit.training.module import SlimModule


def rehearse(model: nn.Module, recipe: Recipe, data: Callable[[], Any]) -> None:
    """Find what is wrong with the recipe's distillation on one training batch.

    Nothing changes: model and data are others, and random numbers go on where they were. A run
    without pretraining need not do this: there the first batch of the training tells the same,
    before any weight changes.

    Args:
        model: as the recipe's function gave it.
        recipe: names teachers and losses.
        data: builds the data module anew.

    Raises:
        SlimkitError: a teacher, place or loss cannot be used.
    """
    if recipe.distill is None:
        return
    distill = recipe.distill.model_copy(update={"cache": None})
    with isolate_rng():
        module = SlimModule(model, recipe.model_copy(update={"distill": distill}))
        for distillation in module.distillation:
            batch = next(iter(Loaders(data(), module.inner).calibration()), None)
            if batch is None:
                return  # said by the training
            module.network.train()
            try:
                with distillation.watching() as caught:
                    module.network(*module.entry(batch))
                distillation.losses_of(caught, batch)
            except SlimkitError:
                raise
            except Exception:  # the model's own step may call it in another way: it will tell
                return
