"""The conformance suite: every promise that slimkit relies on, as checks for a plugin's own tests.

Three lines run it over everything that a distribution registers:

    from slimkit.testing import conformance

    @conformance("slimkit-mytaylor")
    def test_conformance(check):
        check()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimkit.testing.suite import Check, conformance

__all__ = ["Check", "conformance"]


def __getattr__(name: str) -> Any:
    """Import on first use: the fresh processes of some checks must not have torch."""
    if name not in __all__:
        raise AttributeError(f"module 'slimkit.testing' has no attribute {name!r}")
    from slimkit.testing import suite

    return getattr(suite, name)
