"""Which package has a plugin that is not in use: one that is broken, left out or missing."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint

from slimkit.errors import SlimkitError

PACKAGES: dict[str, dict[str, str]] = {
    "criterion": {"ria": "slimkit-ria"},
    "quantizer": {"octav": "slimkit-octav"},
    "loss": {"pair-wise": "slimkit-skd"},
    "backend": {
        "aoti": "slimkit-aoti",
        "executorch": "slimkit-executorch",
        "openvino": "slimkit-openvino",
    },
}
"""By kind and name, the packages that slimkit's own repository has under ``plugins/``."""


def claims(entry_point: EntryPoint, hook: str, name: str) -> bool:
    """Whether the source of an entry point's module yields a plugin of that name.

    Nothing is imported: a record counts if its name is written out inside the hook.
    """
    from slimkit import source

    try:
        found = source.read(entry_point.module)
    except SlimkitError:
        return False
    return found is not None and name in names_in(found.tree.body, hook)


def names_in(body: Iterable[ast.stmt], hook: str) -> Iterator[object]:
    """The names of the records that a module's hook yields, as far as they are written out."""
    for function in body:
        if isinstance(function, ast.FunctionDef) and function.name == hook:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Plugin"):
                    given = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "name")]
                    yield from (one.value for one in given if isinstance(one, ast.Constant))
