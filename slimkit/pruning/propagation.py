"""Carries the identities of channels through each operation of an exported graph.

Every tensor has one array of identities per dimension. An operation ties dimensions of its inputs
to each other and names the dimensions of its output; the rules are in the `rules_` files. What no
rule can follow is frozen, with the operation's name as the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from slimkit.pruning.identities import Identities, Ids, fixed

Dims = list[Ids]
"""The identities of one tensor: an array for each dimension."""

Rule = Callable[["Propagation", fx.Node, str], Any]
"""Ties what an operation ties, and gives the `Dims` of its result (a tuple of them for several)."""


class NotFollowedError(Exception):
    """An operation in a form that is not followed; its text is the reason."""


class Propagation:
    """Walks a graph once; afterwards identities, `reads`, `makes` and `norms` tell everything.

    Args:
        ids: where identities come from.
        rules: operation name, without trailing underscore, to its rule.
    """

    def __init__(self, ids: Identities, rules: Mapping[str, Rule]) -> None:
        self.ids = ids
        self.rules = rules
        self.reads: set[tuple[str, int]] = set()  # (tensor, dimension) that reads channels
        self.makes: set[tuple[str, int]] = set()  # (tensor, dimension) that makes channels
        self.norms: dict[str, str] = {}  # weight -> weight of the batch-norm right behind
        self._values: dict[fx.Node, Any] = {}
        self._names: dict[fx.Node, str] = {}

    def state(self, node: fx.Node, name: str, shape: Sequence[int]) -> Dims:
        """Give a parameter or buffer identities of its own."""
        dims = [self.ids.new(size) for size in shape]
        self._values[node], self._names[node] = dims, name
        return dims

    def argument(self, node: fx.Node, shape: Sequence[int]) -> None:
        """An input of the model: all its dimensions must stay."""
        self._values[node] = [fixed(size) for size in shape]

    def value(self, node: fx.Node) -> Any:
        """Identities of what a node gives: `Dims`, or a tuple of them; None for no tensor."""
        return self._values.get(node)

    def call(self, node: fx.Node) -> None:
        """Follow one operation."""
        if node.target is operator.getitem:
            source, position = node.args
            whole = self._values.get(source) if isinstance(source, fx.Node) else None
            known = isinstance(whole, tuple) and isinstance(position, int)
            self._values[node] = whole[position] if known else fixed_like(node.meta.get("val"))  # type: ignore[index]
            return
        packet = getattr(node.target, "overloadpacket", None)
        name = packet.__name__ if packet is not None else str(node.target)
        rule = self.rules.get(name) or self.rules.get(name.removesuffix("_"))
        if rule is None:
            self._give_up(node, f"the operation {name} is not understood")
            return
        try:
            self._values[node] = rule(self, node, name)
        except NotFollowedError as reason:
            self._give_up(node, f"{name}: {reason}")

    def dims(self, argument: Any) -> Dims | None:
        """Identities of an argument; None where it is no tensor."""
        found = self._values.get(argument) if isinstance(argument, fx.Node) else None
        return found if isinstance(found, list) else None

    def tensor(self, node: fx.Node, position: int, name: str = "") -> Dims:
        """Identities of an argument that must be a tensor.

        Raises:
            NotFollowedError: it is none.
        """
        found = self.dims(argument(node, position, name))
        if found is None:
            raise NotFollowedError(f"argument {name or position} is no tensor")
        return found

    def given(self, node: fx.Node, position: int, name: str = "") -> Dims | None:
        """Identities of an argument that may be left out."""
        return self.dims(argument(node, position, name))

    def name(self, node: fx.Node, position: int, name: str = "") -> str | None:
        """The path of an argument that is a parameter or buffer itself."""
        found = argument(node, position, name)
        return self._names.get(found) if isinstance(found, fx.Node) else None

    def note(self, name: str | None, *, makes: int | None, reads: int | None) -> None:
        """Remember which dimensions of a weight make and read channels."""
        if name is not None:
            if makes is not None:
                self.makes.add((name, makes))
            if reads is not None:
                self.reads.add((name, reads))

    def freeze(self, dims: Dims, why: str) -> None:
        """All channels of a tensor must stay."""
        for dim in dims:
            self.ids.freeze(dim, why)

    def _give_up(self, node: fx.Node, why: str) -> None:
        """Freeze everything that goes in; what comes out is fixed."""
        for source in node.all_input_nodes:
            for dims in tensors_of_value(self._values.get(source)):
                self.freeze(dims, why)
        self._values[node] = fixed_like(node.meta.get("val"))


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument of a node by position or name; None if it was left out."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name)


def shape_of(node: fx.Node) -> list[int]:
    """The shape of the one tensor that a node gives."""
    return [int(size) for size in node.meta["val"].shape]


def tensors_of_value(value: Any) -> list[Dims]:
    """All tensors' identities in a node's value."""
    if isinstance(value, tuple):
        return [dims for part in value for dims in tensors_of_value(part)]
    return [value] if isinstance(value, list) else []


def fixed_like(value: Any) -> Any:
    """Identities that must stay, in the shape of a node's result."""
    if isinstance(value, torch.Tensor):
        return [fixed(int(size)) for size in value.shape]
    if isinstance(value, list | tuple):
        return tuple(fixed_like(part) for part in value)
    return None
