"""Pruning of single weights while a network trains: zero from the window on, to the very end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from torch import Tensor

from slimkit.pruning.granularity import choose
from slimkit.pruning.schedules import amount
from slimkit.pruning.sparsity import (
    WeightMasks,
    Weights,
    check_criterion,
    ratio_of,
    weight_scores,
)
from slimkit.pruning.statistics import Measured
from slimkit.recipe import Prune
from slimkit.training.following import log_pruning
from slimkit.training.window import PruningCallback

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


def weights_ratio(recipe: Prune) -> float:
    """The fraction of the weights that a recipe zeroes."""
    target = recipe.target
    return ratio_of(recipe.granularity, None if target is None else {target.kind: target.value})


class WeightPruning(PruningCallback):
    """Zeroes weights of a `SlimModule`'s network on the recipe's timeline and keeps them zero.

    When the window has closed nothing is left of the masks in the network but zeros.

    Args:
        module: owns the network and remembers what was done.
        recipe: the prune section; its granularity is not ``channel``.
    """

    lasting = True

    def __init__(self, module: SlimModule, recipe: Prune) -> None:
        super().__init__(module, recipe)
        self.ratio = weights_ratio(recipe)
        check_criterion(self.criterion, recipe.granularity)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Finish at the latest when training ends; an average may have become the network."""
        super().on_train_end(trainer, module)
        if self.masks is not None:
            self._apply(trainer)

    def _analyse(self) -> None:
        network, recipe, state = self.module.network, self.recipe, self.module.state
        assert recipe.granularity != "channel"
        weights = Weights.of(
            network,
            state.example_inputs,
            recipe.granularity,
            recipe.protect,
            recipe.protect_first,
        )
        self.masks = WeightMasks(network, weights, state.living)
        # a fraction out of reach is said now, not after the window
        self._choose({name: kept.float() for name, kept in self.masks.kept.items()}, self.ratio)

    def _score(
        self, measured: Mapping[str, Measured] | None, fisher: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        assert isinstance(self.masks, WeightMasks)
        network, weights = self.module.network, self.masks.weights
        return weight_scores(network, weights, self.criterion, measured, fisher)

    def _scored(self) -> list[str]:
        assert isinstance(self.masks, WeightMasks)
        return [*self.masks.weights.axes]

    def _update(self, due: int) -> None:
        assert isinstance(self.masks, WeightMasks)
        share = amount(self.recipe.schedule, due / self._updates, 1 - self.ratio)
        self.masks.kept = self._choose(self.masks.silence(self._scores), self.ratio * share)
        self._scores, self._measured = {}, None
        state = self.module.state
        state.updates = due
        state.living = {name: kept.clone() for name, kept in self.masks.kept.items()}
        log_pruning(
            self.module.trainer, self.module.network, self.masks.sparsity(), state.macs_left
        )
        zeros, total = self.masks.zeros()
        self.module.say(
            f"{zeros / total:.1%} of {total:,} weights are zero, step {due} of {self._updates}"
        )

    def _choose(self, scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
        assert isinstance(self.masks, WeightMasks)
        return choose(
            scores,
            self.masks.weights.axes,
            self.masks.weights.granularity,
            ratio,
            ranking=self.recipe.ranking,
            max_ratio=self.recipe.max_ratio,
            block_size=self.recipe.block_size or (1, 4),
        )

    def _finish(self, trainer: pl.Trainer) -> None:
        assert isinstance(self.masks, WeightMasks)
        self._apply(trainer)
        network = self.module.network
        report = self.masks.report(network, self.module.state.example_inputs)
        network.slimkit_pruning = report  # type: ignore[assignment]  # a plain attribute
