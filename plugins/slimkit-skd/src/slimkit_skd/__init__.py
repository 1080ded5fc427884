"""Tells slimkit that this package has the loss ``pair-wise``; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_losses() -> Iterator[Plugin]:
    """The distillation loss of this package."""
    yield Plugin("pair-wise", "slimkit_skd.loss:PairWise", "Which places of an image look alike")
