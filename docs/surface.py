"""Writes ``surface.md``, every public name of slimkit with its exact signature, and the schema.

    python docs/surface.py "`Backend.check` takes a `strict` option"

puts the sentence into the CHANGELOG under "Unreleased" and writes ``surface.md`` and
``recipe.schema.json`` anew; a test compares both with the code. Without a sentence nothing is
written.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, SCHEMA = HERE / "surface.md", HERE / "recipe.schema.json"
CHANGELOG = HERE.parent / "CHANGELOG.md"
MODULES = {
    "slimkit": "What `import slimkit` gives.",
    "slimkit.hookspecs": "What a package tells slimkit.",
    "slimkit.interfaces": "What a plugin implements, and the records that it meets.",
    "slimkit.errors": "What slimkit raises.",
    "slimkit.testing": "What a plugin's tests use.",
    "slimkit.importing": "For backends: packages that may be missing, and other backends.",
    "slimkit.onnx_export": "For backends that go by way of ONNX.",
    "slimkit.onnx_sessions": "For backends whose ONNX files ONNX Runtime can run.",
    "slimkit.disk": "For backends whose runtime does not say that a disk is full.",
}
ONLY = {"slimkit.importing": ["backend_named", "required"]}
"""Public names of modules that have others as well."""
HEAD = """\
# The public surface

Written by `python docs/surface.py`, checked by a test; [stability.md](stability.md) explains it.
"""


def names_of(module: str) -> list[str]:
    """The public names of a module: `__all__`, or what it defines without an underscore."""
    found = import_module(module)
    if module in ONLY:
        return sorted(ONLY[module])
    if hasattr(found, "__all__"):
        return sorted(found.__all__)
    own = (n for n, v in vars(found).items() if getattr(v, "__module__", None) == module)
    return sorted(name for name in own if not name.startswith("_"))


def signature(name: str, found: Any) -> str:
    """Name, arguments with types and defaults, and result."""
    if hasattr(found, "model_fields"):  # the recipe, whose fields are in its JSON schema
        return name
    try:
        return f"{name}{inspect.signature(found)}"
    except (TypeError, ValueError):
        return name


def _members(found: type[Any]) -> Iterator[str]:
    """Attributes, properties and methods that the class itself defines."""
    if hasattr(found, "model_fields"):
        return
    if dataclasses.is_dataclass(found):
        return
    annotations = found.__dict__.get("__annotations__", {})
    for name, value in sorted(found.__dict__.items()):
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"{name} -> {inspect.signature(value.fget).return_annotation}"
        elif inspect.isfunction(value):
            yield signature(name, value)
        elif name in annotations:
            yield f"{name}: {annotations[name]} = {_written(value)}"
    for name in sorted(set(annotations) - set(found.__dict__)):
        if not name.startswith("_"):
            yield f"{name}: {annotations[name]}"


def _written(value: object) -> str:
    """A default in an order that does not change from run to run."""
    return f"frozenset({sorted(value)})" if isinstance(value, frozenset) else repr(value)


def surface() -> str:
    """The page."""
    from slimkit.deploy.folder import FORMAT
    from slimkit.recipe import Recipe

    version = Recipe.model_fields["version"].default
    lines = [HEAD, f"Format of artifacts: {FORMAT}. Version of recipes: {version}.", ""]
    for module, says in MODULES.items():
        lines += [f"## `{module}`", "", says, "", "```python"]
        for name in names_of(module):
            found = getattr(import_module(module), name)
            if inspect.isclass(found):
                bases = ", ".join(base.__name__ for base in found.__bases__ if base is not object)
                lines.append(f"class {signature(name, found)}" + (f" of {bases}" if bases else ""))
                lines += [f"    {member}" for member in _members(found)]
            else:
                lines.append(signature(name, found) if callable(found) else name)
        lines += ["```", ""]
    return "\n".join(lines)


def schema() -> str:
    """The JSON schema of recipes, for editors."""
    from slimkit.recipe import Recipe

    return json.dumps(Recipe.json_schema(), indent=1) + "\n"


def main(sentence: str) -> None:
    """Write page and changelog."""
    changelog = CHANGELOG.read_text(encoding="utf-8")
    head, mark, rest = changelog.partition("## [Unreleased]\n")
    section, following = rest.partition("\n## [")[0], "".join(rest.partition("\n## [")[1:])
    if "### Changed\n" not in section:
        section = f"{section.rstrip()}\n\n### Changed\n\n"
    section = section.replace("### Changed\n\n", f"### Changed\n\n- {sentence}\n", 1)
    CHANGELOG.write_text(head + mark + section + following, encoding="utf-8")
    PAGE.write_text(surface(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].strip() or sys.argv[1].startswith("-"):
        sys.exit("say in one sentence what changes for plugins: it goes into the CHANGELOG")
    main(sys.argv[1])
