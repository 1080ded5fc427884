"""Tells slimkit that this package has the backend ``aoti``; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """The backend of this package."""
    yield Plugin("aoti", "slimkit_aoti.backend:Aoti", "A library compiled by torch's Inductor")
