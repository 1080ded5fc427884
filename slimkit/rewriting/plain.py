"""Weights that PyTorch computes anew for each forward (weight_norm, spectral_norm) become plain."""

from __future__ import annotations

from torch import nn

from slimkit.rewriting.changes import Change, Plain, computed_tensors
from slimkit.rewriting.found import Found


def plain_weights(model: nn.Module, inputs: tuple[object, ...]) -> Found:  # noqa: ARG001
    """What parametrizations and the hooks of weight_norm and spectral_norm give stays as it is.

    Args:
        model: not changed.
        inputs: the forward's arguments.
    """
    changes: list[Change] = [
        Plain(path, name)
        for path, module in model.named_modules()
        for name in computed_tensors(module)
    ]
    return Found(changes)
