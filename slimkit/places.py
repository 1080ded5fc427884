"""Where a tensor is taken: the path of a module, and the way into what the module gives.

``layer3`` is what that module gives; ``output`` what the whole model gives. Of an output that is no
tensor, a further path takes a part: ``output.logits``, ``head.cls[0]``, ``backbone["c3"]``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from slimkit.errors import SlimkitError, did_you_mean

OUTPUT = "output"

_STEP = re.compile(
    r"""(?P<dot>\.)?(?P<name>[^\s.\[\]"']+)|\[(?:(?P<index>-?\d+)|"(?P<key>[^"]*)"|'(?P<k>[^']*)')\]"""
)


@dataclass(frozen=True)
class Step:
    """One step into a value: ``.key`` may be an attribute or a key; ``[key]`` only the latter."""

    key: str | int
    dotted: bool = False

    def __str__(self) -> str:
        return f".{self.key}" if self.dotted else f"[{self.key!r}]"


def parse(place: str) -> tuple[Step, ...]:
    """The steps of a place.

    Raises:
        ValueError: it is no path.

    >>> [str(step) for step in parse('backbone.fpn["c3"][0]')]
    ['.backbone', '.fpn', "['c3']", '[0]']
    """
    steps: list[Step] = []
    at = 0
    while at < len(place):
        found = _STEP.match(place, at)
        name = found and found["name"]
        if not found or (name and bool(found["dot"]) != bool(steps)) or not (steps or name):
            raise ValueError(
                f"{place!r} is no path at {place[at:]!r}: write one such as layer3, head.cls[0], "
                'output.logits or backbone["c3"]'
            )
        if name:
            steps.append(Step(name, dotted=True))
        elif found["index"] is not None:
            steps.append(Step(int(found["index"])))
        else:
            steps.append(Step(found["key"] if found["key"] is not None else found["k"]))
        at = found.end()
    if not steps:
        raise ValueError("names no place; write 'output' or the path of a module")
    return tuple(steps)


@dataclass(frozen=True)
class Place:
    """A module and the way into what it gives.

    Args:
        text: as the recipe writes it.
        module: the module's path; empty for the whole model.
        steps: into what it gives.
    """

    text: str
    module: str
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, text: str, modules: Collection[str]) -> Place:
        """The place in a network, where as much of the text as possible names a module.

        Args:
            text: as a recipe writes it.
            modules: the paths of the network's modules.

        Raises:
            SlimkitError: no part of it names a module.
        """
        steps = parse(text)
        names: list[str] = []
        for step in steps:
            if not step.dotted:
                break
            names.append(str(step.key))
        for n in range(len(names), 0, -1):
            path = ".".join(names[:n])
            if path == OUTPUT:
                return cls(text, "", steps[n:])
            if path in modules:
                return cls(text, path, steps[n:])
        hint = did_you_mean(".".join(names), [*modules, OUTPUT])
        raise SlimkitError(f"has no module {text!r}{hint}")

    def pick(self, value: Any) -> Any:
        """The part of what the module gave.

        Raises:
            SlimkitError: there is no such part.
        """
        gone = OUTPUT if not self.module else self.module
        for step in self.steps:
            try:
                value = _inside(value, step)
            except (LookupError, TypeError, AttributeError):
                raise SlimkitError(
                    f"{gone!r} gives {describe(value)}, in which there is no {step}"
                    + did_you_mean(str(step.key), [str(key) for key in _keys(value)])
                ) from None
            gone += str(step)
        return value


def _inside(value: Any, step: Step) -> Any:
    if isinstance(value, Mapping):
        return value[step.key]
    if isinstance(step.key, str):
        if step.dotted:
            return getattr(value, step.key)
        raise LookupError(step.key)
    if isinstance(value, list | tuple):
        return value[step.key]
    raise LookupError(step.key)


def _keys(value: Any) -> list[Any]:
    """What may stand behind a value: keys, or names of what an object holds."""
    if isinstance(value, Mapping):
        return [*value]
    return [*getattr(value, "_fields", getattr(value, "__dict__", {}))]


def describe(value: Any) -> str:
    """The kind of a value in a few words, with shapes or keys.

    >>> describe({"logits": 1, "boxes": 2})
    'a dict of logits, boxes'
    """
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, value))}"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return f"a {type(value).__name__} of {len(value)}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a tensor {tuple(shape)}"
    keys = _keys(value)
    return f"a {type(value).__name__}" + (f" of {', '.join(keys)}" if keys else "")
