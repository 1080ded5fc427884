"""Yields a name that no recipe may write, and a good one beside it."""

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_backends():
    """Two backends."""
    yield Plugin("My Backend", "broken_target:Nothing", "A name with a space")
    yield Plugin("of-names", "broken_target:Nothing", "Its good neighbour")
