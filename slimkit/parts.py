"""Finds the part of a model that a recipe compresses."""

from __future__ import annotations

from torch import nn

from slimkit.errors import SlimkitError, did_you_mean


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
