"""Yields a class instead of a record."""

from slimkit.hookspecs import hookimpl


@hookimpl
def slimkit_quantizers():
    """One quantizer."""
    yield dict
