"""Every rewrite by name; importing this does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from slimkit.errors import RewritingError, did_you_mean


@dataclass(frozen=True)
class Known:
    """One rewrite.

    Args:
        name: as a recipe writes it.
        exact: whether the outputs stay the same up to float rounding; else its cost is measured.
        target: ``package.module:function`` that finds what it would change.
        summary: one line for people.
    """

    name: str
    exact: bool
    target: str
    summary: str


REWRITES = {
    known.name: known
    for known in (
        Known(
            "focus-to-conv",
            True,
            "slimkit.rewriting.focus:focus_to_conv",
            "Slices of the image that a convolution reads become one larger, strided convolution",
        ),
        Known(
            "fixed-pooling",
            True,
            "slimkit.rewriting.pooling:fixed_pooling",
            "Adaptive pooling becomes pooling with a kernel and a stride",
        ),
        Known(
            "remove-noops",
            True,
            "slimkit.rewriting.noops:remove_noops",
            "Dropout, drop-path and identities go; training is without them, too",
        ),
        Known(
            "plain-weights",
            True,
            "slimkit.rewriting.plain:plain_weights",
            "Weights of weight_norm, spectral_norm and parametrizations become plain parameters",
        ),
        Known(
            "pad-channels",
            True,
            "slimkit.rewriting.padding:pad_channels",
            "Channels of convolutions are filled up with zeros to a multiple",
        ),
        Known(
            "silu-to-hardswish",
            False,
            "slimkit.rewriting.activations:silu_to_hardswish",
            "SiLU becomes hard-swish, which has no exponential",
        ),
        Known(
            "sigmoid-to-hardsigmoid",
            False,
            "slimkit.rewriting.activations:sigmoid_to_hardsigmoid",
            "Sigmoid becomes hard-sigmoid, which has no exponential",
        ),
        Known(
            "gelu-to-tanh",
            False,
            "slimkit.rewriting.activations:gelu_to_tanh",
            "Exact GELU becomes its form with tanh",
        ),
    )
}


def known(name: str) -> Known:
    """The rewrite of that name.

    >>> known("focus-to-conv").exact
    True

    Raises:
        RewritingError: there is none; the message has the nearest name.
    """
    if name not in REWRITES:
        raise RewritingError(f"no rewrite is called {name!r}{did_you_mean(name, REWRITES)}")
    return REWRITES[name]
