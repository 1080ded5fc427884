"""Tells slimkit that this package has the distillation loss ``cwd``; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_losses() -> Iterator[Plugin]:
    """The distillation loss of this package."""
    yield Plugin("cwd", "slimkit_cwd.loss:CWD", "Where each channel looks")
