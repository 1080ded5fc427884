"""Where a tensor is taken: the path of a module, and the way into what the module gives.

``layer3`` is what that module gives; ``output`` what the whole model gives. Of an output that is no
tensor, brackets take a part: ``head.cls[0]`` of a tuple or list, ``backbone["c3"]`` of a dict or of
an object with such an attribute. Behind ``output`` dots do as well: ``output.logits``.
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
    """One step into a value, as an attribute or a key."""

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
        """The place in a network.

        Args:
            text: as a recipe writes it.
            modules: the paths of the network's modules.

        Raises:
            SlimkitError: there is no such module.
        """
        steps = parse(text)
        names: list[str] = []
        for step in steps:
            if not step.dotted:
                break
            names.append(str(step.key))
        path = ".".join(names)
        if names[0] == OUTPUT and (len(names) == 1 or path not in modules):
            return cls(text, "", steps[1:])
        if path in modules:
            return cls(text, path, steps[len(names) :])
        raise SlimkitError(f"has no module {path!r}{did_you_mean(path, [*modules, OUTPUT])}")

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
    if isinstance(value, list | tuple) and isinstance(step.key, int):
        return value[step.key]
    if step.key in _keys(value):
        return getattr(value, str(step.key))
    raise LookupError(step.key)


def _keys(value: Any) -> list[Any]:
    """What may stand behind a value: keys, or names of what an object holds."""
    if isinstance(value, Mapping):
        return [*value]
    if hasattr(value, "shape"):  # a tensor has no parts to compare
        return []
    slots = getattr(value, "__dataclass_fields__", getattr(value, "__dict__", {}))
    return [*getattr(value, "_fields", slots)]


def describe(value: Any) -> str:
    """The kind of a value in a few words, with shapes or keys.

    >>> describe({"logits": 1, "boxes": 2})
    'a dict of logits, boxes'
    """
    if hasattr(value, "shape"):
        return f"a tensor {tuple(value.shape)}"
    name = type(value).__name__
    kind = f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return f"{kind} of {len(value)}"
    keys = _keys(value)
    return f"{kind} of {', '.join(map(str, keys))}" if keys else kind
