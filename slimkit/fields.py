"""What one field of a recipe may hold: numbers in their ranges, names, import paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from slimkit.errors import RewritingError, did_you_mean
from slimkit.places import parse
from slimkit.rewriting.known import REWRITES, known


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"should be a number, not {str(value).lower()}")
    return value


def _place(value: Any) -> Any:
    sides = [value] if isinstance(value, str) else value
    if isinstance(sides, list | tuple) and len(sides) == 1 and isinstance(sides[0], list | tuple):
        sides = [sides[0], sides[0]]  # several places, the same on both sides
    several = isinstance(sides, list | tuple) and len(sides) == (1 if isinstance(value, str) else 2)
    if not several or not all(_is_side(side) for side in sides):
        raise ValueError(
            "should be 'output', the path of a module, or [student's path, teacher's path]; where "
            "a loss compares several places at once, each path is a list, and [[first, second]] "
            f"means the same on both sides; not {value!r}"
        )
    for side in sides:
        for path in [side] if isinstance(side, str) else side:
            parse(path)
    if isinstance(value, str):
        return value
    return tuple(side if isinstance(side, str) else tuple(side) for side in sides)


def _is_side(side: object) -> bool:
    if isinstance(side, list | tuple):
        return bool(side) and all(isinstance(path, str) for path in side)
    return isinstance(side, str)


_TEACHERS = ("dense", "ema", "mutual")


def _teacher(value: str) -> str:
    if value in _TEACHERS or is_import_path(value) or is_file(value):
        return value
    near = did_you_mean(value, _TEACHERS).partition("; there are")[0]
    raise ValueError(
        "should be dense, ema, mutual, 'package.module:name' of what returns a model, or the path "
        f"of an artifact or a weights file, such as './big'; not {value!r}{near}"
    )


def is_file(value: str) -> bool:
    """Whether this reads as the path of a file or folder."""
    return "/" in value or "\\" in value or value.endswith((".safetensors", ".pt", ".pth"))


def one_or_more(schema: Any) -> BeforeValidator:
    """Lets one teacher stand for a list of one; `schema` is both, for the JSON schema."""

    def widen(value: Any) -> Any:
        if isinstance(value, str):
            _teacher(value)  # said without the path of a list that nobody wrote
        return value if isinstance(value, list | tuple) else [value]

    return BeforeValidator(widen, json_schema_input_type=schema)


def number_or(schema: Any) -> WrapValidator:
    """Lets a number stand, and stay, where a mapping may; `schema` is both."""

    def keep(value: Any, mapping: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, Mapping | BaseModel):
            return mapping(value)
        wrong = ValueError(
            "should be a number of at least 0, or a schedule such as {value: 1, schedule: linear, "
            f"to: 0.1}}; not {value!r}"
        )
        try:
            number = float(_no_bool(value))
        except (TypeError, ValueError):
            raise wrong from None
        if not 0 <= number < float("inf"):
            raise wrong
        return number

    return WrapValidator(keep, json_schema_input_type=schema)


def _devices(value: Any) -> Any:
    several = value if isinstance(value, list) else [value]
    kinds = int if isinstance(value, list) else int | str
    if any(isinstance(device, bool) or not isinstance(device, kinds) for device in several):
        raise ValueError(f"should be a number, 'auto' or a list of numbers, not {value!r}")
    return value


def _one_or_two(value: Any) -> Any:
    several = value if isinstance(value, list | tuple) else [value]
    try:
        numbers = [float(_no_bool(number)) for number in several]
    except (TypeError, ValueError):
        numbers = []
    fits = numbers and all(0 <= number < 1 for number in numbers)
    if not fits or (several is value and len(numbers) != 2):
        raise ValueError(
            "should be a number from 0 to below 1, or two of them for the first and the last "
            f"group, such as [0.2, 0.6]; not {value!r}"
        )
    return tuple(numbers) if several is value else numbers[0]


def _moment(value: Any) -> Any:
    wrong = ValueError(
        "should be a fraction of the training from 0 to 1, or a whole number of optimizer steps "
        f"above 1; not {value!r}"
    )
    try:
        number = float(_no_bool(value))
    except TypeError:
        raise wrong from None
    except ValueError as error:
        raise (error if isinstance(value, bool) else wrong) from None
    if 0 <= number <= 1:
        return number
    if number < 0 or number != number // 1:  # infinity and NaN, too
        raise wrong
    return int(number)


def is_import_path(value: str) -> bool:
    """Whether this reads ``package.module:name``."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value) is not None


def _import_path(value: str) -> str:
    if not is_import_path(value):
        raise ValueError(f"should look like 'package.module:name', not {value!r}")
    return value


def bare(key: str, schema: Any) -> BeforeValidator:
    """Lets bare text stand for a mapping with only `key`; `schema` is both, for the JSON schema."""

    def widen(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        if isinstance(value, Mapping | BaseModel):
            return value
        raise ValueError(f"should be text, or a mapping with {key!r}, not {value!r}")

    return BeforeValidator(widen, json_schema_input_type=schema)


_NUMBER = BeforeValidator(_no_bool)
Count = Annotated[int, Field(ge=0), _NUMBER]
Positive = Annotated[int, Field(ge=1), _NUMBER]
Bits = Annotated[int, Field(ge=2, le=16), _NUMBER]
Factor = Annotated[float, Field(ge=0), _NUMBER]
Fraction = Annotated[float, Field(ge=0, le=1), _NUMBER]
Moment = Annotated[float | int, BeforeValidator(_moment)]
NotAll = Annotated[float, Field(ge=0, lt=1), _NUMBER]
NotNone = Annotated[float, Field(gt=0, le=1), _NUMBER]
Share = Annotated[float, Field(gt=0, lt=1), _NUMBER]
OneOrTwo = Annotated[NotAll | tuple[NotAll, NotAll], BeforeValidator(_one_or_two)]
OverZero = Annotated[float, Field(gt=0), _NUMBER]
Options = Annotated[dict[str, Any], Field(description="Keyword arguments, by name.")]
Patterns = Annotated[tuple[str, ...], Field(description="Module names, * and ? allowed.")]


def _corrections(given: object) -> object:
    """A single name as a tuple; auto alone."""
    names = (given,) if isinstance(given, str) else given
    if isinstance(names, list | tuple) and "auto" in names and len(names) > 1:
        raise ValueError("auto stands alone: it tries every correction")
    return names


Corrections = Annotated[
    tuple[Literal["auto", "equalize", "rounding", "batchnorm", "bias"], ...],
    BeforeValidator(_corrections),
]
KeptFloat = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda given: (given,) if given == "auto" else given),
    Field(description="Module names, * and ? allowed, or auto."),
]


def _ratios(given: object, fractions: ValidatorFunctionWrapHandler) -> object:
    """The one word, or a mapping."""
    if given == "sensitivity":
        return given
    if isinstance(given, str):
        raise ValueError(f"should be a mapping, or sensitivity, not {given!r}")
    return fractions(given)


if TYPE_CHECKING:
    Ratios = dict[str, float] | Literal["sensitivity"]
else:  # a union would put its members' names into the paths of problems
    Ratios = Annotated[
        dict[str, NotAll],
        WrapValidator(_ratios, json_schema_input_type=dict[str, NotAll] | Literal["sensitivity"]),
        PlainSerializer(lambda ratios: ratios),
    ]


def _rewrite(name: str) -> str:
    try:
        return known(name).name
    except RewritingError as error:
        raise ValueError(str(error)) from None


RewriteName = Annotated[
    str,
    AfterValidator(_rewrite),
    WithJsonSchema({"enum": list(REWRITES), "type": "string"}),
]
ImportPath = Annotated[str, AfterValidator(_import_path)]
Side = str | tuple[str, ...]
Place = Annotated[str | tuple[Side, Side], BeforeValidator(_place)]
TeacherName = Annotated[str, AfterValidator(_teacher)]
Devices = Annotated[int | str | list[int], BeforeValidator(_devices)]
