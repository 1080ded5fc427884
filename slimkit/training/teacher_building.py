"""Builds the teachers that a recipe names."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from slimkit.deploy.artifact import load
from slimkit.errors import SlimkitError
from slimkit.parts import built
from slimkit.recipe import Distill, Optimizer
from slimkit.recipe import Teacher as Wanted
from slimkit.training.classification import Classification, network_of
from slimkit.training.copies import own_copy
from slimkit.training.entering import Entry
from slimkit.training.teachers import Average, Peer, Teacher
from slimkit.weights import load_weights


def teachers_of(recipe: Distill, entry: Entry, optimizer: Optimizer) -> list[Teacher]:
    """The teachers that a recipe names, built without drawing a random number.

    Args:
        recipe: the distill section.
        entry: to the student, as it is before anything is compressed.
        optimizer: for a peer that is a plain module.

    Raises:
        SlimkitError: one cannot be built, loaded, or trained.
    """
    with torch.random.fork_rng():
        return [_built(wanted, recipe, entry, optimizer) for wanted in recipe.teacher]


def _built(wanted: Wanted, recipe: Distill, entry: Entry, optimizer: Optimizer) -> Teacher:
    learns = wanted.learns or wanted.kind == "mutual"
    if wanted.kind == "ema":
        return Average(own_copy(entry.network), wanted, recipe)
    made: nn.Module
    if wanted.kind == "import":
        what = {"target": wanted.name, "options": wanted.options}
        made = built(what, what="distill.teacher")
    elif wanted.kind == "file":
        made = _from_file(Path(wanted.name), entry)
    else:
        made = network_of(own_copy(entry.inner), None)
    if wanted.weights is not None:
        _load(made, wanted.weights)
    network = _part(made, entry)
    if not learns:
        return Teacher(network, wanted, recipe)
    if isinstance(made, pl.LightningModule):
        return Peer((made, network), wanted, recipe)
    if not isinstance(entry.inner, Classification):
        raise SlimkitError(
            f"distill.teacher: {wanted.name} returns a {type(made).__name__}, which has no loss to "
            "learn by: return a LightningModule"
        )
    return Peer((Classification(made, optimizer), network), wanted, recipe)


def _part(made: nn.Module, entry: Entry) -> nn.Module:
    """What stands beside the student's network: the part of that path, or all where it has none."""
    parts = dict(made.named_modules(remove_duplicate=False))
    return made if entry.path is None else parts.get(entry.path, made)


def _from_file(path: Path, entry: Entry) -> nn.Module:
    if not path.exists():
        raise SlimkitError(f"distill.teacher: there is no file or folder {path} in {Path.cwd()}")
    if path.is_dir():
        return load(path)
    made = network_of(own_copy(entry.inner), None)
    _load(made, path)
    return made


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise SlimkitError(f"distill.teacher: there is no weights file {path} in {Path.cwd()}")
    try:
        load_weights(network, path)
    except SlimkitError as error:
        raise SlimkitError(f"distill.teacher: {error}") from error
