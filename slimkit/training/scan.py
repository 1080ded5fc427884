"""Ranks what a recipe's quantization costs, place by place; a killed scan goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from slimkit.batches import inputs_of, samples_of, to_cpu
from slimkit.errors import SlimkitError
from slimkit.importing import build
from slimkit.quantization.calibration import quantize
from slimkit.quantization.sensitivity import Sensitivity, rank
from slimkit.recipe import Recipe
from slimkit.registry import discover
from slimkit.training.deployment import Loaders
from slimkit.training.evaluation import muted
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
    if recipe.model is None or recipe.data is None:
        raise SlimkitError("the recipe must name a model and data for a scan")
    if recipe.quantize is None:
        raise SlimkitError("the recipe has no quantize section: there is nothing to scan")
    with muted():
        pl.seed_everything(recipe.trainer.seed, workers=True, verbose=False)
    data = build(recipe.data.model_dump(), "data", pl.LightningDataModule)
    model = build(recipe.model.model_dump(), "model", nn.Module).cpu()
    if recipe.weights is not None:
        load_weights(model, recipe.weights)
    elif recipe.pretrain is not None:
        say("the recipe has no weights: this scans the model as it is built, before any training")
    section = recipe.quantize
    batches = list(islice(Loaders(data).calibration(), section.calibration_batches))
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
    few = samples_of(to_cpu(inputs_of(batches[0], model)), 0, samples)
    key = _key(quantized, few, backend)
    known = _read(journal, key)
    if known:
        say(f"going on from {journal}: {len(known)} places are known")
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not known:
        journal.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")

    def done(one: Sensitivity) -> None:
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(one)) + "\n")

    return rank(quantized, [few], known, done)


def _key(quantized: nn.Module, inputs: object, backend: str) -> str:
    """A hash of the weights, the calibrated ranges, the inputs and the backend."""
    found = hashlib.sha256(backend.encode())
    tensors = [*quantized.state_dict().values(), *torch.utils._pytree.tree_leaves(inputs)]
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(journal: Path, key: str) -> list[Sensitivity]:
    """What an earlier scan of the same things wrote; a last line that was cut off is left out."""
    if not journal.is_file():
        return []
    found = []
    for number, line in enumerate(journal.read_text(encoding="utf-8").splitlines()):
        try:
            entry = json.loads(line)
            if number == 0:
                if entry.get("key") != key:
                    return []
                continue
            found.append(Sensitivity(**{**entry, "calls": tuple(entry["calls"])}))
        except (ValueError, TypeError, KeyError, AttributeError):
            break
    return found
