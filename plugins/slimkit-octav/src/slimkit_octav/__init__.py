"""Tells slimkit that this package has the quantizer ``octav``; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_quantizers() -> Iterator[Plugin]:
    """The quantizer of this package."""
    yield Plugin("octav", "slimkit_octav.quantizer:OCTAV", "The clip of least error, by Newton")
