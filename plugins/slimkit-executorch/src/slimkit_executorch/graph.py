"""The ATen graph of a finished program: its roundings, its constants, its layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed operations
from torch import Tensor
from torch.fx import GraphModule, Node

_aten, _ops = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE = _ops.quantize_per_tensor.default
DEQUANTIZE = _ops.dequantize_per_tensor.default
DEQUANTIZE_CONSTANT = _ops.dequantize_per_channel.default
LAYERS = frozenset(
    {_aten.conv1d.default, _aten.conv2d.default, _aten.linear.default}
    | {_aten.conv1d.padding, _aten.conv2d.padding}
)
"""Operations that take (input, weight, bias) first."""
ACTIVATIONS = frozenset({_aten.relu.default, _aten.hardtanh.default})
"""What XNNPACK merges into the layer in front of it."""


def tensor_of(module: GraphModule, node: Node) -> Tensor:
    """The constant that a ``get_attr`` node stands for."""
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


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
