"""Tells slimkit that this package has the backend ``remote``; imports no runtime."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """The backend of this package."""
    yield Plugin(
        "remote",
        "slimkit_remote.backend:Remote",
        "another backend's files, run and measured on a board behind ssh",
    )
