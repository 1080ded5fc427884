"""What a rewrite would change in a model, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from slimkit.calls import Call, Trace, trace
from slimkit.errors import PruningError, RewritingError
from slimkit.evaluating import without_fast_paths
from slimkit.pruning.patterns import check_pattern, covers
from slimkit.rewriting.changes import Change


@dataclass(frozen=True)
class Found:
    """The answer of a rewrite's function.

    Args:
        changes: in the order in which they are applied.
        left: a module or group that stays as it is, to the reason.
    """

    changes: Sequence[Change]
    left: dict[str, str] = field(default_factory=dict)


def traced(model: nn.Module, inputs: tuple[object, ...]) -> Trace:
    """The operation calls of a forward in evaluation mode.

    Raises:
        RewritingError: the model does not run on the inputs.
    """
    try:
        with without_fast_paths():
            return trace(model, inputs)
    except Exception as error:
        raise RewritingError(
            f"{type(model).__name__} does not run on the example inputs: "
            f"{type(error).__name__}: {error}"
        ) from error


def owner(call: Call | str) -> str:
    """Dotted path of the module whose forward makes the call."""
    name = call if isinstance(call, str) else call.name
    return name.split(":")[0].replace("/", ".")


def here(call: Call | str) -> str:
    """The call's name in that forward, as ``getitem:0``."""
    name = call if isinstance(call, str) else call.name
    return name.partition(":")[2]


def within(path: str, at: Sequence[str]) -> bool:
    """Whether the module is one that `at` names, or lies in one; none named: all are."""
    return not at or any(covers(pattern, [path]) or _inside(path, pattern) for pattern in at)


def _inside(path: str, pattern: str) -> bool:
    parts = path.split(".")
    return any(covers(pattern, [".".join(parts[:n])]) for n in range(1, len(parts)))


def check_places(model: nn.Module, at: Iterable[str]) -> None:
    """Refuse a pattern that names no module; raises `RewritingError`."""
    for pattern in at:
        try:
            check_pattern("at", pattern, model)
        except PruningError as error:
            raise RewritingError(str(error)) from error
