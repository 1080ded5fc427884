"""Carries the identities of channels through each operation of an exported graph.

Every tensor has one array of identities per dimension. An operation ties dimensions of its inputs
to each other and names the dimensions of its output; the rules are in the `rules_` files. What no
rule can follow is frozen, with the operation's name as the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from slimkit.pruning.identities import FIXED, Identities, Ids, fixed

Dims = list[Ids]
"""The identities of one tensor: an array for each dimension."""

Place = tuple[str, int]
"""A parameter or buffer, and one of its dimensions."""

Rule = Callable[["Propagation", fx.Node, str], Any]
"""Ties what an operation ties, and gives the `Dims` of its result (a tuple of them for several)."""


_PLAIN = " (rewrite: [plain-weights] first makes the weight a plain one)"
WAYS_OUT = {
    "_weight_norm": _PLAIN,
    "_weight_norm_interface": _PLAIN,
    "mv": f" in spectral_norm{_PLAIN}",
}
"""What helps against operations that are not understood."""


@dataclass(frozen=True)
class Doubt:
    """Channels that pass an operation with a size in it, which may be a constant of the code.

    Args:
        ids: the channels.
        module: dotted path of the module whose forward makes the call.
        sizes: the sizes before and after.
    """

    ids: Ids
    module: str
    sizes: frozenset[int]


class NotFollowedError(Exception):
    """An operation in a form that is not followed; its text is the reason."""


class Propagation:
    """Walks the graphs of a model; `ids`, `tensors`, `reads`, `makes` and `norms` tell the rest.

    Args:
        ids: where identities come from.
        rules: operation name, without trailing underscore, to its rule.
    """

    def __init__(self, ids: Identities, rules: Mapping[str, Rule]) -> None:
        self.ids = ids
        self.rules = rules
        self.tensors: dict[str, Dims] = {}  # the parameters and buffers
        self.reads: set[Place] = set()  # where channels are read
        self.makes: set[Place] = set()  # where channels are made
        self.first: set[Place] = set()  # where channels are made of the model's input itself
        self.norms: dict[str, str] = {}  # weight -> the batch-norm right behind
        self.doubts: list[Doubt] = []  # channels behind a size that may be a constant
        self.normed: list[Ids] = []  # channels that are made one number, or weighed by their sum
        self.queries: list[tuple[Ids, int]] = []  # of attention scaled by their size; their rows
        self.head_views: set[fx.Node] = set()  # those that must keep heads together
        self._module = ""  # whose forward runs
        self._values: dict[fx.Node, Any] = {}
        self._weights: set[fx.Node] = set()  # parameters, buffers and what is computed from them
        self._makers: dict[fx.Node, set[Place]] = {}
        self._inputs: set[fx.Node] = set()  # inputs, and what no layer was applied to yet
        self._starts: list[int] = []  # the first identity of each of `_places`
        self._places: list[set[Place]] = []
        self._end = 0  # behind the last of their identities

    def state(self, node: fx.Node, name: str, shape: Sequence[int], tied: str | None) -> None:
        """Give a parameter or buffer identities: its own, or those of the one that it is `tied` to.

        All of them must come before the first operation of the first graph.
        """
        if name in self.tensors:  # in another graph of the same model
            dims = self.tensors[name]
        elif tied is not None and tied in self.tensors:
            dims = self.tensors[tied]
            for places in self._places:
                places |= {(name, d) for owner, d in places if owner == tied}
        else:
            dims = [self.ids.new(size) for size in shape]
            self._starts += [int(dim[0]) for dim in dims if dim.size]
            self._places += [{(name, d)} for d, dim in enumerate(dims) if dim.size]
            self._end = self.ids.count
        self._values[node] = self.tensors[name] = dims
        self._weights.add(node)

    def argument(self, node: fx.Node, shape: Sequence[int]) -> None:
        """An input of the model: all its dimensions must stay."""
        self._values[node] = [fixed(size) for size in shape]
        self._inputs.add(node)

    def constant(self, node: fx.Node, shape: Sequence[int]) -> None:
        """A tensor that the code holds: all its dimensions must stay."""
        self._values[node] = [fixed(size) for size in shape]
        self._weights.add(node)

    def value(self, node: fx.Node) -> Any:
        """Identities of what a node gives: `Dims`, or a tuple of them; None for no tensor."""
        return self._values.get(node)

    def call(self, node: fx.Node) -> None:
        """Follow one operation."""
        self._module = node.meta.get("module", "")
        if all(source in self._weights for source in node.all_input_nodes):
            self._weights.add(node)
        self._apply(node)
        data = set(node.all_input_nodes) - self._weights
        if data and data <= self._inputs and node not in self._makers:
            self._inputs.add(node)

    def _apply(self, node: fx.Node) -> None:
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
            self._give_up(node, f"the operation {name} is not understood{WAYS_OUT.get(name, '')}")
            return
        try:
            followed = rule(self, node, name)
        except NotFollowedError as reason:
            self._give_up(node, f"{name}: {reason}")
        except (IndexError, TypeError, ValueError, ZeroDivisionError):  # an overload not thought of
            self._give_up(node, f"{name} in a form that is not followed")
        else:
            if _sizes(followed) == _sizes(fixed_like(node.meta.get("val"))):
                self._values[node] = followed
            else:
                self._give_up(node, f"{name} in a form that is not followed")

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

    def note(self, node: fx.Node, weight: Any, *, makes: int | None, reads: int | None) -> None:
        """Remember which dimensions of a weight make and read channels in `node`.

        Where the weight is computed, they are those of the parameters behind it; where it comes
        from the data, there is nothing to remember.
        """
        dims = self.dims(weight)
        if dims is None or weight not in self._weights:
            return
        if makes is not None:
            self._makers[node] = self.where(dims[makes])
            self.makes |= self._makers[node]
            if set(node.all_input_nodes) - self._weights <= self._inputs:
                self.first |= self._makers[node]
        if reads is not None:
            self.reads |= self.where(dims[reads])

    def makers(self, node: Any) -> set[Place]:
        """The weights that make the channels of what a layer gives; none for other operations."""
        return self._makers.get(node, set())

    def owners(self, node: Any) -> list[str]:
        """The parameters and buffers whose channels a tensor holds, if no data comes in."""
        dims = self.dims(node) if node in self._weights else None
        return sorted({name for dim in dims or [] for name, _ in self.where(dim)})

    def where(self, ids: Ids) -> set[Place]:
        """The dimensions of parameters and buffers whose own identities these are."""
        own = ids[(ids > FIXED) & (ids < self._end)]
        found = np.unique(np.searchsorted(self._starts, own, side="right") - 1)
        return set().union(*(self._places[k] for k in found.tolist()))

    def broadcast(self, out: Ids, dim: Ids, why: str) -> Ids:
        """Make a dimension of an operand one with the result's, or stretch it if it is shorter."""
        if len(dim) == len(out):
            return self.ids.tie(out, dim, why)
        self.stretch(dim, why)
        return out

    def stretch(self, dim: Ids, why: str) -> None:
        """A dimension of size one meets all positions of another, so its channel must stay."""
        self.ids.freeze(dim, f"{why}: a single channel stretched over many")

    def doubt(self, ids: Ids, sizes: Iterable[int]) -> None:
        """These channels may only go if the sizes follow them."""
        self.doubts.append(Doubt(ids, self._module, frozenset(sizes)))

    def freeze(self, dims: Dims, why: str) -> None:
        """All channels of a tensor must stay."""
        for dim in dims:
            self.ids.freeze(dim, why)

    def _give_up(self, node: fx.Node, why: str) -> None:
        """Freeze everything that goes in; what comes out is fixed."""
        for source in node.all_input_nodes:
            for dims in tensors_of_value(self._values.get(source)):
                self.freeze(dims, why)
                if source in self._weights and len(dims) > 1:  # so that its layer is listed
                    self.makes |= set().union(*(self.where(dim) for dim in dims))
        self._values[node] = fixed_like(node.meta.get("val"))


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument of a node by position or name; None if it was left out."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name)


def option(node: fx.Node, name: str) -> Any:
    """An argument by its name in the operation's schema, with the schema's default."""
    for position, known in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if known.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, known.default_value if known.has_default_value() else None)
    return None


def shape_of(node: fx.Node) -> list[int]:
    """The shape of the one tensor that a node gives."""
    return [int(size) for size in node.meta["val"].shape]


def tensors_of_value(value: Any) -> list[Dims]:
    """All tensors' identities in a node's value."""
    if isinstance(value, tuple):
        return [dims for part in value for dims in tensors_of_value(part)]
    return [value] if isinstance(value, list) else []


def _sizes(value: Any) -> Any:
    """The shape that identities are for."""
    if isinstance(value, tuple):
        return tuple(_sizes(part) for part in value)
    return [len(dim) for dim in value] if isinstance(value, list) else None


def fixed_like(value: Any) -> Any:
    """Identities that must stay, in the shape of a node's result."""
    if isinstance(value, torch.Tensor):
        return [fixed(int(size)) for size in value.shape]
    if isinstance(value, list | tuple):
        return tuple(fixed_like(part) for part in value)
    return None
