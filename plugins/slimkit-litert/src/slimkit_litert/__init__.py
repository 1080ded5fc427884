"""Tells slimkit that this package has the backend ``litert``; imports no runtime."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """The backend of this package."""
    yield Plugin(
        "litert", "slimkit_litert.backend:LiteRt", "LiteRT (TFLite) files, run through XNNPACK"
    )
