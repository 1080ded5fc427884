"""Fits values to annotations with pydantic, and says in slimkit's words what does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticSchemaGenerationError,
    TypeAdapter,
    ValidationError,
)

from slimkit.errors import PluginError, Problem, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def option_types(cls: Callable[..., Any]) -> tuple[dict[str, Any], set[str]]:
    """Annotation of each keyword-only argument of a callable, and the names without default."""
    types, required = {}, set()
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        types[name] = _resolved(cls, name, parameter.annotation)
        if parameter.default is inspect.Parameter.empty:
            required.add(name)
    return types, required


def _resolved(cls: Any, name: str, annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    constructor: Any = cls.__init__ if inspect.isclass(cls) else cls
    try:
        return eval(annotation, inspect.unwrap(constructor).__globals__)
    except NameError as error:
        raise PluginError(
            f"annotation {annotation!r} of option {name!r} of {cls.__module__}.{cls.__qualname__} "
            f"cannot be resolved ({error}); import what it names outside of TYPE_CHECKING"
        ) from error


def fit(
    values: Mapping[str, Any], types: Mapping[str, Any], required: Collection[str] = ()
) -> tuple[dict[str, Any], list[Problem]]:
    """Coerce named values to their types.

    Numbers may be written as text ("1e-3"), but true and false are only good for a bool.

    Returns:
        The values that fit, and a problem for each that does not, is unknown or is missing.
    """
    good, problems = {}, []
    for name, value in values.items():
        if name not in types:
            problems.append(Problem(str(name), f"no such option{did_you_mean(str(name), types)}"))
            continue
        try:
            good[name] = _fitted(value, types[name])
        except ValidationError as error:
            # A union tells one error for each member; the first is the one that was meant.
            problems.append(Problem(name, complaint(error.errors()[0])))
    for name in sorted(set(required) - set(values)):
        problems.append(Problem(name, "is required"))
    return good, problems


def _fitted(value: Any, annotation: Any) -> Any:
    try:
        adapter = TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    return adapter.validate_python(value, strict=True if isinstance(value, bool) else None)


def complaint(error: ErrorDetails) -> str:
    """The message of one pydantic error, without its accent."""
    if error["type"] == "missing":
        return "is required"
    if error["type"] in {"model_type", "dict_type", "model_attributes_type"}:
        return f"should be a mapping, not {error['input']!r}"
    if error["type"] in {"tuple_type", "list_type"}:
        one = error["input"]
        shown = one if isinstance(one, str) else "..." if isinstance(one, dict) else repr(one)
        return f"should be a list, such as [{shown}]" + ("" if shown == one else f", not {one!r}")
    if error["type"] == "invalid_key":
        return f"keys are words, not {error['input']!r}: put it into quotes if it is meant"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"].replace("Input should", "should", 1)
    if isinstance(error["input"], str | int | float | None):
        message += f", not {error['input']!r}"
    return message


class Misfit(ValueError):
    """Two parts of a document that are right alone but not together; for root validators."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def complaints(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """Every problem of a document with its path, and the nearest key for an unknown one."""
    problems = []
    for details in error.errors():
        cause = details.get("ctx", {}).get("error")
        path = cause.path if isinstance(cause, Misfit) else dotted(details["loc"])
        if details["type"] == "extra_forbidden":
            *parents, key = details["loc"]
            near = did_you_mean(str(key), _keys_at(root, parents))
            problems.append(Problem(path, f"no such key{near}"))
        else:
            problems.append(Problem(path, complaint(details)))
    return problems


def _keys_at(node: type[BaseModel], place: list[int | str]) -> list[str]:
    for part in place:
        if isinstance(part, str):
            node = next(_nodes(node.model_fields[part].annotation))
    return list(node.model_fields)


def _nodes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _nodes(part)


def dotted(place: Sequence[str | int]) -> str:
    """A path as people write it: ``distill.losses[1].at``."""
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
