"""Rewrites a recipe's network on the first batch, and measures there what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from slimkit.batches import first_sample, inputs_of, to_cpu
from slimkit.errors import SlimkitError
from slimkit.recipe import Recipe
from slimkit.rewriting.known import known
from slimkit.rewriting.rewrite import rewrite_
from slimkit.training.deployment import Loaders
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
    recipe = module.recipe
    evaluate = None
    if not all(known(rewrite.name).exact for rewrite in recipe.rewrite):
        loader = loaders.selection() or loaders.evaluation()
        evaluate = Evaluator(module.inner, loader, recipe.metric)
    network = module.network
    inputs = _example(loaders, network)
    report = module.rewrite_(inputs, loaders.calibration(), evaluate)
    for line in str(report).splitlines():
        say(line)


def rewrite_before_scan(model: nn.Module, recipe: Recipe, loaders: Loaders) -> None:
    """Rewrite a model in place as a recipe says, for a scan of what comes after."""
    chosen = [rewrite.model_dump() for rewrite in recipe.rewrite]
    rewrite_(model, _example(loaders, model), chosen)


def _example(loaders: Loaders, network: nn.Module) -> tuple[Any, ...]:
    """One sample of the first training batch."""
    batch = next(iter(loaders.calibration()), None)
    if batch is None:
        raise SlimkitError("the training data is empty: it gave no batch")
    return first_sample(to_cpu(inputs_of(batch, network)))
