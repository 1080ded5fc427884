"""Finds every problem of a recipe that can be found without importing a model or torch."""

from __future__ import annotations

import ast
import builtins
import pathlib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import PydanticUserError, TypeAdapter

from slimkit import source
from slimkit.deploy.folder import MANIFEST
from slimkit.errors import PluginError, Problem, RecipeError, SlimkitError, did_you_mean
from slimkit.fields import is_file, is_import_path
from slimkit.recipe import Loss, Prune, Recipe, Trainer
from slimkit.registry import discover
from slimkit.rewriting.known import REWRITES
from slimkit.strict_yaml import load
from slimkit.validation import fit

_PLUGINS = {
    "prune.criterion": "criterion",
    "quantize.weights": "quantizer",
    "quantize.activations": "quantizer",
    "distill.losses": "loss",
    "export": "backend",
}


def problems(recipe_path: str | Path) -> list[Problem]:
    """Everything that is wrong with the recipe file; an empty list means that it can run.

    What the schema refuses does not hide the rest: plugins, import paths, the weights file and
    Trainer arguments are looked up in the file as it stands.
    """
    try:
        document = load(recipe_path)
    except RecipeError as error:
        return list(error.problems) or [Problem("", str(error))]
    found: list[Problem] = []
    try:
        found += _combinations(Recipe.parse(document))
    except RecipeError as error:
        found += error.problems
    found += _plugins(document)
    found += _rewrites(document.get("rewrite"))
    for key, what in (("model", "the model"), ("data", "a LightningDataModule")):
        if document.get(key) is None:
            found.append(Problem(key, f"is required: package.module:name of what returns {what}"))
        found += _import(key, document.get(key))
    found += _distillation(document.get("distill"))
    found += _weights("weights", document.get("weights"))
    found += _trainer(document.get("trainer"))
    return found


def _combinations(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.prune and not recipe.quantize and not recipe.rewrite:
        yield Problem("", "nothing to do: give 'prune', 'quantize', 'rewrite' or several of them")
    if recipe.prune:
        yield from _window(recipe, recipe.prune)
    if not recipe.prune or recipe.prune.granularity != "channel":
        without = "without 'prune'" if not recipe.prune else "by zero weights, which count, too"
        for name in ("macs_ratio", "params_ratio"):
            gate = getattr(recipe.gates, name)
            if gate is not None and gate < 1:
                yield Problem(f"gates.{name}", f"{gate} cannot be reached {without}")


def _window(recipe: Recipe, prune: Prune) -> Iterator[Problem]:
    """What can be known of a window in steps without the data's length."""
    most = (recipe.trainer.model_extra or {}).get("max_steps")
    end = prune.during[1]
    if isinstance(end, int) and isinstance(most, int) and 0 < most < end:
        yield Problem("prune.during", f"ends at step {end}, but trainer.max_steps is {most}")
    if prune.regularizer and not recipe.trainer.max_epochs:
        yield Problem("prune.regularizer", "needs training, but trainer.max_epochs is 0")


def _plugins(document: Mapping[str, Any]) -> Iterator[Problem]:
    registry = discover()
    for place, kind in _PLUGINS.items():
        value: Any = document
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        several = value if isinstance(value, list) else [value]
        for i, reference in enumerate(several):
            path = f"{place}[{i}]" if isinstance(value, list) else place
            name, options = _parts(reference, "name")
            if name is None:
                continue  # left out, or the schema complains
            try:
                plugin = registry.find(kind, name)
            except PluginError as error:
                yield Problem(path, str(error))
                continue
            try:
                yield from _call(f"{path}.options", plugin.target, options, keyword_only=True)
            except SlimkitError as error:
                yield Problem(path, f"{plugin}: {error}")


def _rewrites(section: object) -> Iterator[Problem]:
    """Options that a rewrite does not take."""
    for i, reference in enumerate(section if isinstance(section, list) else ()):
        name, options = _parts(reference, "name")
        if name in REWRITES:  # else the schema complains
            target = REWRITES[name].target
            yield from _call(f"rewrite[{i}].options", target, options, keyword_only=True)


def _import(path: str, reference: object) -> Iterator[Problem]:
    target, options = _parts(reference, "target")
    if target is None or target.count(":") != 1:
        return  # the schema complains
    try:
        yield from _call(f"{path}.options", target, options, keyword_only=False)
    except SlimkitError as error:
        yield Problem(path, str(error))


def _parts(reference: object, key: str) -> tuple[str | None, dict[str, Any]]:
    """Name and options of bare text or a mapping; None for anything else."""
    if isinstance(reference, str):
        return reference, {}
    if not isinstance(reference, Mapping) or not isinstance(reference.get(key), str):
        return None, {}
    options = reference.get("options")
    return reference[key], options if isinstance(options, dict) else {}


def _call(
    path: str, target: str, options: Mapping[str, Any], keyword_only: bool
) -> Iterator[Problem]:
    """What is wrong with calling a target; raises `SlimkitError` if it does not exist."""
    module, _, name = target.partition(":")
    found = source.read(module)
    names = found.names() if found else None
    if names is not None and name not in names:
        raise SlimkitError(f"{module!r} has no {name!r}{did_you_mean(name, sorted(names))}")
    definition = found.find(name) if found else None
    if not definition or definition.parameters is None:
        return  # what it takes cannot be known from here
    known = definition.options if keyword_only else definition.parameters
    assert known is not None
    types = {parameter.name: _type(parameter.annotation) for parameter in known}
    required = {parameter.name for parameter in known if parameter.default is None}
    _, misfits = fit(options, types, required)
    yield from (Problem(f"{path}.{misfit.path}", misfit.message) for misfit in misfits)


def _weights(place: str, path: object) -> Iterator[Problem]:
    if isinstance(path, str) and not Path(path).is_file():
        yield Problem(place, f"there is no file {path!r} in {Path.cwd()}")


def _distillation(section: object) -> Iterator[Problem]:
    """Teachers that are not there, and losses that cannot compare what the recipe names."""
    if not isinstance(section, Mapping):
        return
    given = section.get("teacher", "dense")
    learning = False
    for i, teacher in enumerate(given if isinstance(given, list) else [given]):
        path = f"distill.teacher[{i}]" if isinstance(given, list) else "distill.teacher"
        name = _parts(teacher, "name")[0]
        more = teacher if isinstance(teacher, Mapping) else {}
        learning = learning or name == "mutual" or more.get("learns") is True
        if name is None:
            continue  # the schema complains
        if is_import_path(name):
            yield from _import(path, {**more, "target": name})
        elif is_file(name) and not Path(name).exists():
            yield Problem(path, f"there is no file or folder {name!r} in {Path.cwd()}")
        elif Path(name).is_dir() and is_file(name) and not Path(name, MANIFEST).is_file():
            yield Problem(path, f"{name!r} is no artifact: it holds no {MANIFEST}")
        yield from _weights(f"{path}.weights", more.get("weights"))
    cache = section.get("cache")
    if isinstance(cache, str) and Path(cache).is_file():
        yield Problem("distill.cache", f"{cache!r} is a file: name a folder")
    losses = section.get("losses")
    for i, loss in enumerate(losses if isinstance(losses, list) else ()):
        yield from _compared(f"distill.losses[{i}]", loss, learning)


def _compared(path: str, reference: object, learning: bool) -> Iterator[Problem]:
    """What the source of a loss tells of the places that it compares, and of what it learns."""
    try:
        loss = Loss.model_validate({"name": reference} if isinstance(reference, str) else reference)
        target = discover().find("loss", loss.name).target
        module, _, name = target.partition(":")
        found = source.read(module)
    except (ValueError, SlimkitError):
        return  # said elsewhere
    definition = found.find(name) if found else None
    if definition is None:
        return
    wanted = definition.attributes.get("places", "1")
    if wanted.isdecimal() and {len(side) for side in loss.sides} != {int(wanted)}:
        several = "write [[first, second]]" if int(wanted) > 1 else "write one entry for each place"
        yield Problem(f"{path}.at", f"{loss.name} compares {wanted} at once: {several}")
    if learning and definition.attributes.get("student_channels", "{}") != "{}":
        yield Problem(
            path,
            f"{loss.name} learns parameters, which works one way only: with a teacher that learns, "
            "choose losses without, such as kl",
        )


def _trainer(arguments: object) -> Iterator[Problem]:
    found = source.read("pytorch_lightning.trainer.trainer")
    definition = found.find("Trainer") if found else None
    if not isinstance(arguments, Mapping) or not definition or definition.options is None:
        return
    types = {option.name: _type(option.annotation) for option in definition.options}
    further = {k: v for k, v in arguments.items() if k not in Trainer.model_fields}
    _, misfits = fit(further, types)
    yield from (Problem(f"trainer.{misfit.path}", misfit.message) for misfit in misfits)


def _type(annotation: str | None) -> Any:
    """What an annotation means; Any where that needs more than builtins, typing and Path."""
    if annotation is None:
        return Any
    tree = ast.parse(annotation, mode="eval")
    allowed = (ast.Expression, ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Tuple)
    harmless = (*allowed, ast.List, ast.BinOp, ast.BitOr, ast.Load)
    if not all(isinstance(node, harmless) for node in ast.walk(tree)):
        return Any
    types = {k: v for k, v in vars(builtins).items() if isinstance(v, type)}
    scope = {**vars(typing), **types, "typing": typing, "Path": Path, "pathlib": pathlib}
    try:
        meant = eval(annotation, {**scope, "__builtins__": {}})
        known = TypeAdapter(meant).pydantic_complete  # false for a name in quotes
    except (NameError, AttributeError, TypeError, PydanticUserError):
        return Any
    return meant if known else Any
