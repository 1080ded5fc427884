"""Tells slimkit which plugins this package has; imports none of them."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_criteria() -> Iterator[Plugin]:
    """The criterion of this package."""
    yield Plugin("fourth-power", "slimkit_example.criterion:FourthPower", "Weights ** 4")


@hookimpl
def slimkit_quantizers() -> Iterator[Plugin]:
    """The quantizer of this package."""
    yield Plugin("last-batch", "slimkit_example.quantizer:LastBatch", "Range of the last batch")


@hookimpl
def slimkit_losses() -> Iterator[Plugin]:
    """The distillation loss of this package."""
    yield Plugin("feature-l1", "slimkit_example.loss:FeatureL1", "Absolute distance of features")


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """The backend of this package."""
    yield Plugin("made-up-npu", "slimkit_example.npu:MadeUpNpu", "A processor that does not exist")
