"""Implements no hook: the decorator was forgotten."""

from slimkit.hookspecs import Plugin


def slimkit_criteria():
    """One criterion."""
    yield Plugin("of-hookless", "broken_target:Nothing", "Never found")
