"""Fails inside its hook."""

from slimkit.hookspecs import hookimpl


@hookimpl
def slimkit_criteria():
    """No criterion."""
    raise LookupError("no table of criteria")
