"""What a package promises as a whole."""

from __future__ import annotations

import inspect
import pickle
import re
import tempfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from torch import nn

from slimkit.grid import Grid
from slimkit.registry import GROUP, discover
from slimkit.testing.promises import Promises, Subject
from slimkit.testing.worker import in_fresh_process
from slimkit.validation import fit, option_types

PACKAGE = Promises()

MOST_MS = 50.0
_TRIES = 3


def itself(subject: Subject) -> Iterator[str]:
    """No case but the package itself."""
    yield f"{subject.name} {subject.version} as it is installed"


def plugins(subject: Subject) -> Iterator[Subject]:
    """Each of its plugins, with each set of options."""
    yield from subject.make()


def _entry_points(subject: Subject) -> list[str]:
    if subject.name == GROUP:
        return []
    points = distribution(subject.name).entry_points
    return [point.name for point in points if point.group == GROUP]


@PACKAGE.on(itself)
def everything_it_registers_works(subject: Subject, _case: str) -> str | None:
    """No entry point, hook or record of the package is listed as broken."""
    name = re.sub(r"[-_.]+", "-", subject.name).lower()
    mine = [b for b in discover().broken if re.sub(r"[-_.]+", "-", b.package).lower() == name]
    return "\n".join(map(str, mine)) or None


@PACKAGE.on(itself)
def listed_without_importing_torch(subject: Subject, _case: str) -> str | None:
    """Listing plugins imports neither torch nor Lightning, directly or by way of others."""
    answer = _listing(subject)
    return f"{' and '.join(answer['heavy'])} was imported" if answer["heavy"] else None


@PACKAGE.on(itself)
def listed_in_no_time(subject: Subject, _case: str) -> str | None:
    """The package's own part of ``slimkit list-plugins`` takes less than 50 ms.

    The best of three is taken.
    """
    times = []
    for _ in range(_TRIES):
        answer = _listing(subject)
        times.append(answer["ms"])
        if times[-1] < MOST_MS:
            return None
        if times[-1] > 10 * MOST_MS:
            break
    return f"{min(times):.0f} ms"


def _listing(subject: Subject) -> dict[str, Any]:
    allowed = ",".join(_entry_points(subject))
    return in_fresh_process("listing", Path(), SLIMKIT_PLUGINS=allowed)


@PACKAGE.on(plugins)
def targets_are_importable(_: Subject, plugin: Subject) -> str | None:
    """The target of every record can be imported and is a subclass of its interface.

    Its class has a docstring of its own, which ``slimkit list-plugins NAME`` shows.
    """
    cls = discover().load_class(plugin.kind, plugin.name)
    doc = cls.__dict__.get("__doc__")
    return None if doc and doc.strip() else f"{plugin.target} has no docstring"


@PACKAGE.on(plugins)
def options_are_valid(_: Subject, plugin: Subject) -> str | None:
    """Options are keyword-only arguments of the constructor with types and defaults that work."""
    cls = discover().load_class(plugin.kind, plugin.name)
    kinds = inspect.Parameter
    given = 1 if plugin.kind == "quantizer" else 0  # the grid
    inherited = cls.__init__ is nn.Module.__init__  # takes nothing, though its signature says so
    parameters = {} if inherited else inspect.signature(cls).parameters
    for parameter in list(parameters.values())[given:]:
        if parameter.kind is not kinds.KEYWORD_ONLY:
            return f"{parameter} of {plugin.target} is not a keyword-only argument"
        if parameter.annotation is kinds.empty:
            return f"{parameter.name} of {plugin.target} has no type"
        if parameter.default is kinds.empty and parameter.name not in plugin.options:
            return f"{parameter.name} of {plugin.target} has no default"
    types = option_types(cls)[0]
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name in types and parameter.default is not kinds.empty
    }
    problems = fit(defaults, types)[1]
    if problems:
        return "\n".join(f"the default of {problem}" for problem in problems)
    _built(plugin)
    return None


@PACKAGE.on(itself)
def pickles_to_a_worker(subject: Subject, _case: str) -> str | None:
    """Every plugin can be pickled and read by a fresh process, as data workers and ranks do."""
    with tempfile.TemporaryDirectory() as name:
        labels = {}
        for number, plugin in enumerate(subject.make()):
            labels[str(number)] = str(plugin)
            try:
                (Path(name) / f"{number}.pickle").write_bytes(pickle.dumps(_built(plugin)))
            except Exception as error:
                return f"{plugin} cannot be pickled: {type(error).__name__}: {error}"
        failed = in_fresh_process("unpickling", Path(name))["failed"]
    lines = [f"{labels[number]} cannot be read: {why}" for number, why in failed.items()]
    return "\n".join(lines) or None


def _built(plugin: Subject) -> Any:
    return plugin.make(Grid()) if plugin.kind == "quantizer" else plugin.make()
