"""Imports what may be missing: what a recipe names by import path, and what a backend needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slimkit.errors import SlimkitError, UnavailableError, did_you_mean

if TYPE_CHECKING:
    from slimkit.interfaces import Backend

T = TypeVar("T")


def build(what: Mapping[str, Any], role: str, kind: type[T]) -> T:
    """Call the function or class at ``what["target"]`` with ``what["options"]``.

    Args:
        what: ``{"target": "package.module:name", "options": {...}}``.
        role: how messages call it, such as ``model``.
        kind: what it must give.

    Raises:
        SlimkitError: it cannot be imported, fails, or gives something else.
    """
    target, options = what["target"], dict(what.get("options") or {})
    module_name, _, name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except Exception as error:
        raise SlimkitError(
            f"{role}: {module_name} cannot be imported from {here}: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        hint = did_you_mean(name, [n for n in vars(module) if not n.startswith("_")])
        raise SlimkitError(f"{role}: {module_name} has no {name!r}{hint}")
    try:
        made = found(**options)
    except SlimkitError:
        raise
    except Exception as error:
        raise SlimkitError(
            f"{role}: {target}({', '.join(options)}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, kind):
        raise SlimkitError(
            f"{role}: {target} must return a {kind.__name__}, but returned {type(made).__name__}"
        )
    return made


def required(module: str, backend: str, distribution: str | None = None) -> Any:
    """The imported module.

    Args:
        module: its name.
        backend: who needs it, for the message.
        distribution: what to install, where that is called otherwise.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"the {backend} backend needs {module}: pip install {distribution or module}"
        ) from error


def backend_named(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """The backend that a recipe would call `name`, for one that stands on it.

    Args:
        name: what ``slimkit list-plugins`` calls it.
        options: keyword-only arguments of its constructor.

    Raises:
        PluginError: there is none, or an option does not fit.
    """
    from slimkit.registry import discover

    backend: Backend = discover().create("backend", name, options)
    return backend
