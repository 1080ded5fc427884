"""Is good but prints, at import and inside its hook."""

from slimkit.hookspecs import Plugin, hookimpl

print("hello from the import")


@hookimpl
def slimkit_criteria():
    """One criterion."""
    print("hello from the hook")
    yield Plugin("of-prints", "broken_target:Nothing", "From a package that prints")
