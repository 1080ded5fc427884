"""Rewrites a recipe's network on the first batch, and measures there what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from slimkit.recipe import Recipe
from slimkit.rewriting.known import known
from slimkit.rewriting.rewrite import rewrite_
from slimkit.training.classification import lightning_of
from slimkit.training.deployment import Loaders, example_of
from slimkit.training.entering import Entry
from slimkit.training.evaluation import Evaluator

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


def rewrite_network(module: SlimModule, loaders: Loaders, say: Callable[[str], None]) -> None:
    """Rewrite the network of `module` as its recipe says, and say what was done at which cost.

    Args:
        module: not trained yet.
        loaders: training batches give the shapes, and validation batches the metric of
            approximate rewrites (test batches, where there are no others).
        say: called with one line at each step.

    Raises:
        SlimkitError: there is no batch, or a rewrite fails.
    """
    recipe, evaluate = module.recipe, None
    if not all(known(rewrite.name).exact for rewrite in recipe.rewrite):
        loader = loaders.selection() or loaders.evaluation()
        evaluator = Evaluator(
            module.inner, loader, recipe.metric, recipe.network, data=loaders.data
        )
        evaluate = evaluator if evaluator.can else None
    inputs = example_of(loaders, module.entry)
    report = module.rewrite_(inputs, module.entry.each(loaders.calibration()), evaluate)
    for line in str(report).splitlines():
        say(line)


def rewrite_before_scan(model: nn.Module, recipe: Recipe, data: Any) -> None:
    """Rewrite the network in `model` in place as a recipe says, for a scan of what comes after."""
    inner = lightning_of(model, recipe.optimizer)
    entry = Entry(inner, recipe.network)
    chosen = [rewrite.model_dump() for rewrite in recipe.rewrite]
    rewrite_(entry.network, example_of(Loaders(data, inner), entry), chosen)
