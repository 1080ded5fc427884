"""Tells slimkit that this package has the criterion ``ria``; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_criteria() -> Iterator[Plugin]:
    """The criterion of this package."""
    yield Plugin("ria", "slimkit_ria.criterion:RIA", "Shares of row and column, times inputs")
