"""Asks a recipe's backends about its model before any training."""

from __future__ import annotations

from collections.abc import Callable

from slimkit.deploy.preflight import Preflight, preflight
from slimkit.recipe import Recipe
from slimkit.registry import discover
from slimkit.training.classification import lightning_of
from slimkit.training.deployment import Loaders, example_of
from slimkit.training.entering import Entry
from slimkit.training.scan import trained


def preflight_of(recipe: Recipe, say: Callable[[str], None]) -> list[Preflight]:
    """What each backend of `export` makes of the recipe's model, float and int8.

    The model is built and rewritten as the recipe says, its first training batch gives the shapes;
    nothing is trained, pruned or kept.

    Raises:
        SlimkitError: model or data cannot be built.
    """
    model, data = trained(recipe, say)
    inner = lightning_of(model, recipe.optimizer).cpu()
    entry = Entry(inner, recipe.network)
    inputs = example_of(Loaders(data, inner), entry)
    backends = {
        ref.name: discover().create("backend", ref.name, ref.options) for ref in recipe.export
    }
    section = recipe.quantize
    if section is None:
        return preflight(entry.network.eval(), inputs, backends, quantized=False)
    return preflight(
        entry.network.eval(),
        inputs,
        backends,
        weights=section.weights.model_dump(),
        keep_float=section.keep_float,
        weight_bits=section.weight_bits,
    )
