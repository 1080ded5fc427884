"""Ranks what a recipe's quantization costs, place by place; a killed scan goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from slimkit.batches import samples_of, to_cpu
from slimkit.errors import SlimkitError
from slimkit.importing import build
from slimkit.journal import Journal
from slimkit.parts import built
from slimkit.quantization.calibration import quantize
from slimkit.quantization.sensitivity import Sensitivity, rank
from slimkit.recipe import Recipe
from slimkit.registry import discover
from slimkit.training.classification import lightning_of
from slimkit.training.deployment import Loaders
from slimkit.training.digest import digest
from slimkit.training.entering import Entry
from slimkit.training.evaluation import muted
from slimkit.training.rewriting import rewrite_before_scan
from slimkit.weights import load_weights


def scan(
    recipe: Recipe, backend: str, journal: Path, *, samples: int, say: Callable[[str], None]
) -> list[Sensitivity]:
    """The places that `backend` would round in the recipe's model, the most harmful first.

    Args:
        recipe: names model, weights and data; its quantize section names the quantizers.
        backend: a plugin's name.
        journal: JSON lines; each place is written there when it is known, and read in a later scan
            of the same model, data and options.
        samples: training samples that the noise is measured on.
        say: called with one line at each step.

    Raises:
        SlimkitError: bad input.
    """
    if recipe.quantize is None:
        raise SlimkitError("the recipe has no quantize section: there is nothing to scan")
    whole, data = trained(recipe, say)
    inner = lightning_of(whole, recipe.optimizer).cpu()
    entry = Entry(inner, recipe.network)
    model = entry.network
    section = recipe.quantize
    loader = Loaders(data, inner).calibration()
    batches = list(islice(entry.each(loader), section.calibration_batches))
    if not batches:
        raise SlimkitError("the training data is empty: it gave no batch")
    options = {ref.name: ref.options for ref in recipe.export}
    target = discover().create("backend", backend, options.get(backend, {}))
    kept = [pattern for pattern in section.keep_float if pattern != "auto"]
    say(f"calibrating for {backend}")
    quantized = quantize(
        model,
        batches,
        target,
        weights=section.weights.model_dump(),
        activations=section.activations.model_dump(),
        batches=section.calibration_batches,
        keep_float=kept,
    ).eval()
    few = samples_of(to_cpu(batches[0][0]), 0, samples)
    key = _key(quantized, few, backend)
    kept_results = Journal(journal, key, _place, say)
    if kept_results.results:
        say(f"going on from {journal}: {len(kept_results.results)} places are known")
    kept_results.start()
    return rank(quantized, [few], kept_results.results, lambda one: kept_results.add(asdict(one)))


def trained(recipe: Recipe, say: Callable[[str], None]) -> tuple[nn.Module, pl.LightningDataModule]:
    """The model and the data that a recipe names, its weights loaded.

    Raises:
        SlimkitError: it names none, or they cannot be built.
    """
    if recipe.model is None or recipe.data is None:
        raise SlimkitError("the recipe must name a model and data for a scan")
    with muted():
        pl.seed_everything(recipe.trainer.seed, workers=True, verbose=False)
    data = build(recipe.data.model_dump(), "data", pl.LightningDataModule)
    model = built(recipe.model.model_dump(), recipe.network)
    if recipe.weights is not None:
        load_weights(model, recipe.weights)
    elif recipe.pretrain is not None:
        say("the recipe has no weights: this scans the model as it is built, before any training")
    if recipe.rewrite:
        rewrite_before_scan(model, recipe, data)
    return model, data


def _place(entry: Any) -> Sensitivity:
    return Sensitivity(**{**entry, "calls": tuple(entry["calls"])})


def _key(quantized: nn.Module, inputs: object, backend: str) -> str:
    """A hash of the weights, the calibrated ranges, the inputs and the backend."""
    return digest(backend, quantized.state_dict(), inputs)
