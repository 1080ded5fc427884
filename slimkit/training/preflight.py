"""Asks a recipe's backends about its model before any training."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl

from slimkit.batches import first_sample, to_cpu
from slimkit.deploy.preflight import Preflight, preflight
from slimkit.errors import SlimkitError
from slimkit.recipe import Recipe
from slimkit.registry import discover
from slimkit.training.classification import Classification
from slimkit.training.deployment import Loaders
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
    lightning = isinstance(model, pl.LightningModule)
    inner = model if lightning else Classification(model, recipe.optimizer)
    assert isinstance(inner, pl.LightningModule)
    entry = Entry(inner.cpu(), recipe.network)
    batch = next(iter(Loaders(data, inner).calibration()), None)
    if batch is None:
        raise SlimkitError("the training data is empty: it gave no batch")
    backends = {
        ref.name: discover().create("backend", ref.name, ref.options) for ref in recipe.export
    }
    section = recipe.quantize
    inputs = first_sample(to_cpu(entry(batch)))
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
