"""Rewrites of what takes tensors apart or stacks them, into operations that XNNPACK has."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from slimkit_executorch.graph import (
    ACTIVATIONS,
    DEQUANTIZE,
    DEQUANTIZE_CONSTANT,
    QUANTIZE,
    add_constant,
    arguments,
    only_reader,
    replace,
    rounded,
    shape_of,
    tensor_of,
)

_aten = torch.ops.aten
_SPLITS: dict[object, int] = {
    _aten.split.Tensor: 2,
    _aten.split_with_sizes.default: 2,
    _aten.chunk.default: 2,
    _aten.unbind.int: 1,
}
"""Operations that give parts of their input, and the position of the dimension."""


def split_by_slices_(module: GraphModule) -> None:
    """Write splits and selections as slices, which XNNPACK has for integers."""
    graph = module.graph
    for node in [*graph.nodes]:
        if node.target in _SPLITS:
            for reader in [*node.users]:
                index = reader.args[1]
                assert isinstance(index, int)
                _slice_(reader, node, index)
            graph.erase_node(node)
        elif node.target is _aten.select.int:
            source, dim, index = node.args
            assert isinstance(source, Node)
            assert isinstance(dim, int)
            assert isinstance(index, int)
            size = shape_of(source)[dim]
            _take_(node, source, dim, index % size, index % size + 1)


def _slice_(part: Node, split: Node, index: int) -> None:
    source = split.args[0]
    dim = split.args[_SPLITS[split.target]] if len(split.args) > _SPLITS[split.target] else 0
    assert isinstance(source, Node)
    assert isinstance(dim, int)
    if split.target is _aten.unbind.int:
        _take_(part, source, dim, index, index + 1)
        return
    sizes = [int(value.shape[dim]) for value in split.meta["val"]]
    _take_(part, source, dim, sum(sizes[:index]), sum(sizes[: index + 1]))


def _take_(part: Node, source: Node, dim: int, begin: int, end: int) -> None:
    """Put a slice in the place of `part`, without that dimension where `part` has it not."""
    graph = part.graph
    with graph.inserting_before(part):
        made = graph.call_function(_aten.slice.Tensor, (source, dim, begin, end))
        if len(shape_of(part)) < len(shape_of(source)):
            made = graph.call_function(_aten.reshape.default, (made, [*shape_of(part)]))
    replace(part, made)


def drop_idle_slices_(module: GraphModule) -> None:
    """Leave out slices that take all there is, which run as copies.

    ``x[:, :n]`` and ``x[:]`` leave them.
    """
    for node in [*module.graph.nodes]:
        if node.target in (_aten.slice.Tensor, _aten.alias.default):
            source = node.args[0]
            assert isinstance(source, Node)
            if shape_of(source) == shape_of(node):
                node.replace_all_uses_with(source)
                module.graph.erase_node(node)


def multiply_in_one_batch_(module: GraphModule) -> None:
    """Write products of stacked matrices with one dimension of stacking, as XNNPACK takes them."""
    graph = module.graph
    for node in [*graph.nodes]:
        if node.target is not _aten.matmul.default:
            continue
        left, right = node.args
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        shapes = shape_of(left), shape_of(right)
        if min(map(len, shapes)) < 3 or shapes[0][:-2] != shapes[1][:-2]:
            continue
        with graph.inserting_before(node):
            flat = [
                graph.call_function(_aten.reshape.default, (one, [-1, *shape[-2:]]))
                for one, shape in zip((left, right), shapes, strict=True)
            ]
            made = graph.call_function(_aten.bmm.default, tuple(flat))
            made = graph.call_function(_aten.reshape.default, (made, [*shape_of(node)]))
        replace(node, made)


def flatten_softmax_(module: GraphModule) -> None:
    """Have a softmax over the last dimension of images read rows.

    Where images lie with channels last, XNNPACK would take it over the channels (ExecuTorch 1.5).
    """
    graph = module.graph
    for node in [*graph.nodes]:
        if node.target is not _aten.softmax.int or node.args[1] not in (-1, 3):
            continue
        shape = shape_of(node)
        if len(shape) != 4 or len(node.args) > 2 or node.kwargs:
            continue
        with graph.inserting_before(node):
            made = graph.call_function(_aten.reshape.default, (node.args[0], [-1, shape[-1]]))
            made = graph.call_function(_aten.softmax.int, (made, -1))
            made = graph.call_function(_aten.reshape.default, (made, [*shape]))
        replace(node, made)


def widen_convolutions_(module: GraphModule) -> None:
    """Write convolutions over one dimension as ones over two, the second of size 1.

    ExecuTorch does so too, but takes one in float for an integer one if what it reads was rounded.
    """
    graph = module.graph
    for node in [*graph.nodes]:
        if node.target is not _aten.conv1d.default:
            continue
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        x, w, bias, stride, padding, dilation, groups = arguments(
            node, names, (None, None, None, [1], [0], [1], 1)
        )
        end = node
        if (reader := only_reader(end)) is not None and reader.target in ACTIVATIONS:
            end = reader
        rounding = only_reader(end)
        constant = w.args[0] if w.target is DEQUANTIZE_CONSTANT else w
        wide = add_constant(module, tensor_of(module, constant).unsqueeze(-1), node)
        with graph.inserting_before(node):
            if constant is not w:
                wide = graph.call_function(DEQUANTIZE_CONSTANT, (wide, *w.args[1:]))
            y = graph.call_function(_aten.reshape.default, (x, [*shape_of(x), 1]))
            if x.target is DEQUANTIZE:
                y = rounded(module, y, x.args[1:])
            y.meta = {"val": x.meta["val"].unsqueeze(-1)}
            sizes = [[*stride, 1], [*padding, 0], [*dilation, 1], groups]
            y = graph.call_function(_aten.conv2d.default, (y, wide, bias, *sizes))
            if end is not node:
                y = graph.call_function(end.target, (y, *end.args[1:]))
            if rounding is not None and rounding.target is QUANTIZE:
                y = rounded(module, y, rounding.args[1:])
            y = graph.call_function(_aten.reshape.default, (y, [*shape_of(end)]))
        replace(end, y)
    graph.eliminate_dead_code()
