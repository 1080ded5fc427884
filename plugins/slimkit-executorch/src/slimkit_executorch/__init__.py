"""Tells slimkit that this package has the backend ``executorch``; imports no runtime."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """The backend of this package."""
    yield Plugin(
        "executorch",
        "slimkit_executorch.backend:ExecuTorch",
        "ExecuTorch programs, computed by XNNPACK on phones and processors",
    )
