"""The ATen graph of a finished program: its roundings, its constants, its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed operations
from torch import Tensor
from torch.fx import GraphModule, Node

_aten, _ops = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE = _ops.quantize_per_tensor.default
DEQUANTIZE = _ops.dequantize_per_tensor.default
DEQUANTIZE_CONSTANT = _ops.dequantize_per_channel.default
LAYERS = frozenset({_aten.conv2d.default, _aten.conv2d.padding, _aten.linear.default})
"""Operations that take (input, weight, bias) first."""
ACTIVATIONS = frozenset({_aten.relu.default, _aten.hardtanh.default})
"""What XNNPACK merges into the layer in front of it."""


@dataclass(frozen=True)
class Steps:
    """The integers that a node rounds to or comes back from.

    Args:
        scale: size of one step.
        zero_point: the integer that stands for 0.
        low: the smallest integer.
        high: the largest integer.
        dtype: their type.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype

    @classmethod
    def of(cls, node: Node) -> Steps:
        """Those of a `QUANTIZE` or `DEQUANTIZE`."""
        return cls(*node.args[1:])  # type: ignore[arg-type]  # the operation's own types

    def integer(self, value: float) -> int:
        """The integer of a value, not clipped."""
        return round(value / self.scale) + self.zero_point


def tensor_of(module: GraphModule, node: Node) -> Tensor:
    """The constant that a ``get_attr`` node stands for."""
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def add_constant(module: GraphModule, value: Tensor, before: Node) -> Node:
    """A new constant, as a node in front of `before`."""
    taken = dict(module.named_buffers())
    name = next(n for i in range(len(taken) + 1) if (n := f"constant{i}") not in taken)
    module.register_buffer(name, value)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def constant_of(module: GraphModule, node: Node, dtype: torch.dtype | None = None) -> Tensor | None:
    """What a dequantized constant is in float; None where it is of another type than `dtype`."""
    integers, scale = (tensor_of(module, n) for n in node.all_input_nodes[:2])
    if dtype is not None and integers.dtype != dtype:
        return None
    axis = node.args[3]
    shape = [-1 if n == axis else 1 for n in range(integers.dim())]
    return (integers.double() * scale.double().reshape(shape)).float()


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of what a node of the exported graph gives."""
    return tuple(int(size) for size in node.meta["val"].shape)


def only_reader(node: Node) -> Node | None:
    """The one node that reads `node`, if it is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def arguments(node: Node, names: tuple[str, ...], defaults: tuple[Any, ...] = ()) -> list[Any]:
    """A call's arguments by position; those left out are their defaults, or None.

    Args:
        node: the call.
        names: of all its parameters, in order.
        defaults: their values where nothing is given.
    """
    given = [*node.args, *(None,) * (len(names) - len(node.args))]
    for n, name in enumerate(names):
        if n >= len(node.args):
            default = defaults[n] if n < len(defaults) else None
            given[n] = node.kwargs.get(name, default)
    return given


def integer_layers(module: GraphModule) -> Iterator[Node]:
    """The layers whose weight is an integer constant."""
    for node in module.graph.nodes:
        weight = node.args[1] if node.target in LAYERS else None
        if isinstance(weight, Node) and weight.target is DEQUANTIZE_CONSTANT:
            yield node


def rounded(module: GraphModule, node: Node, grid: tuple[object, ...]) -> Node:
    """`node` rounded to `grid` and back, where the graph inserts now."""
    there = module.graph.call_function(QUANTIZE, (node, *grid))  # type: ignore[arg-type]
    return module.graph.call_function(DEQUANTIZE, (there, *grid))  # type: ignore[arg-type]


def replace(node: Node, made: Node) -> None:
    """Have `made` read wherever `node` was, which goes."""
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
