"""Finds the part of a model that a recipe compresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from slimkit.copies import uncompiled_
from slimkit.errors import SlimkitError, did_you_mean, in_one_line
from slimkit.importing import build

Model = TypeVar("Model", bound=nn.Module)


def built(reference: Mapping[str, Any], path: str | None = None, what: str = "model") -> nn.Module:
    """The model that a recipe's import names, as it was written and with its network.

    Args:
        reference: import path and options, as `slimkit.importing.build` takes them.
        path: of the part that is compressed.
        what: the key of the recipe, for errors.
    """
    return complete_(uncompiled_(build(reference, what, nn.Module)), path)


def complete_(model: Model, path: str | None = None) -> Model:
    """The model, built now where it is a LightningModule that builds in `configure_model`.

    Nothing is built where there are weights already, and nothing is built again by Lightning.

    Args:
        model: changed in place.
        path: of the part that is compressed.

    Raises:
        SlimkitError: it cannot build without a Trainer, or fails otherwise.
    """
    configure = getattr(model, "configure_model", None)
    if callable(configure) and not _has_weights(model, path):
        try:
            configure()
        except Exception as error:  # whatever a user's code raises
            raise SlimkitError(
                f"configure_model of {type(model).__name__} fails before there is a Trainer "
                f"({in_one_line(error)}): build the network there without one, or in __init__"
            ) from error
        if _has_weights(model, path):
            model.configure_model = _nothing  # type: ignore[assignment]
    return model


def _has_weights(model: nn.Module, path: str | None) -> bool:
    part = model if path is None else dict(model.named_modules(remove_duplicate=False)).get(path)
    return part is not None and next(part.parameters(), None) is not None


def _nothing() -> None:
    """In place of a `configure_model` that has been called."""


def part_of(model: nn.Module, path: str | None) -> nn.Module:
    """The module at a dotted path; without one, the model.

    Raises:
        SlimkitError: there is none.
    """
    if path is None:
        return model
    parts = dict(model.named_modules(remove_duplicate=False))
    if path not in parts:
        raise SlimkitError(
            f"network: {type(model).__name__} has no part {path!r}"
            + did_you_mean(path, [name for name in parts if name])
        )
    return parts[path]
