"""One of two packages that claim the same name."""

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_losses():
    """One loss."""
    yield Plugin("of-two", "broken_target:Nothing", "Two packages have it")
