"""Is good but takes half a second to be imported."""

import time

from slimkit.hookspecs import Plugin, hookimpl

time.sleep(0.5)


@hookimpl
def slimkit_criteria():
    """One criterion."""
    yield Plugin("of-hangs", "broken_target:Nothing", "From a package that hangs")
