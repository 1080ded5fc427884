"""Builds the teachers that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from slimkit.deploy.artifact import load
from slimkit.errors import SlimkitError
from slimkit.importing import build
from slimkit.recipe import Distill, Optimizer
from slimkit.recipe import Teacher as Wanted
from slimkit.training.classification import Classification
from slimkit.training.copies import own_copy
from slimkit.training.teachers import Average, Peer, Teacher
from slimkit.weights import load_weights


def teachers_of(
    recipe: Distill, inner: pl.LightningModule | nn.Module, network: nn.Module, optimizer: Optimizer
) -> list[Teacher]:
    """The teachers that a recipe names, built without drawing a random number.

    Args:
        recipe: the distill section.
        inner: the student's LightningModule.
        network: its network, as it is before anything is compressed.
        optimizer: for a peer that is a plain module.

    Raises:
        SlimkitError: one cannot be built, loaded, or trained.
    """
    with torch.random.fork_rng():
        return [_built(wanted, recipe, inner, network, optimizer) for wanted in recipe.teacher]


def _built(
    wanted: Wanted, recipe: Distill, inner: Any, network: nn.Module, optimizer: Optimizer
) -> Teacher:
    if wanted.kind == "ema":
        return Average(own_copy(network), wanted, recipe)
    if wanted.kind == "import":
        what = {"target": wanted.name, "options": wanted.options}
        made = build(what, "distill.teacher", nn.Module)
    elif wanted.kind == "file":
        made = _from_file(Path(wanted.name), network)
    else:
        made = own_copy(network)
    if wanted.weights is not None:
        _load(made, wanted.weights)
    if not (wanted.learns or wanted.kind == "mutual"):
        return Teacher(made, wanted, recipe)
    if isinstance(made, pl.LightningModule):
        return Peer((made, made), wanted, recipe)
    if not isinstance(inner, Classification):
        raise SlimkitError(
            f"distill.teacher: {wanted.name} returns a {type(made).__name__}, which has no loss to "
            "learn by: return a LightningModule"
        )
    return Peer((Classification(made, optimizer), made), wanted, recipe)


def _from_file(path: Path, network: nn.Module) -> nn.Module:
    if not path.exists():
        raise SlimkitError(f"distill.teacher: there is no file or folder {path} in {Path.cwd()}")
    if path.is_dir():
        return load(path)
    made = own_copy(network)
    _load(made, path)
    return made


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise SlimkitError(f"distill.teacher: there is no weights file {path} in {Path.cwd()}")
    try:
        load_weights(network, path)
    except SlimkitError as error:
        raise SlimkitError(f"distill.teacher: {error}") from error
