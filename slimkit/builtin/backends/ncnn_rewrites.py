"""Exact rewrites of a program's graph into operations that ncnn has."""

from __future__ import annotations

import torch
from torch import Tensor, fx

_slice = torch.ops.aten.slice.Tensor
_transpose = torch.ops.aten.transpose.int
_TRANSPOSED = frozenset(
    {torch.ops.aten.mT.default, torch.ops.aten.numpy_T.default, torch.ops.aten.t.default}
)
_pool = torch.ops.aten.max_pool2d.default
_alias = torch.ops.aten.alias.default


def without_aliases_(graph: fx.Graph) -> None:
    """Leave out aliases, such as a slice of everything, which pnnx does not know."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _alias:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def strided_slices_as_pooling_(graph: fx.Graph) -> None:
    """Replace x[:, :, a:b:s, c:d:t] by x[:, :, a:b, c:d] and pooling over windows of one element.

    ncnn's Crop has no step. A window of one element has one maximum, so nothing changes but the
    operation. Slices that keep everything go away.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _slice:
            continue
        source = node.args[0]
        before, after = _value(source), _value(node)
        given = tuple(node.args[1:])
        dim, start, end, step = given + (0, 0, 2**63 - 1, 1)[len(given) :]
        if before is None or after is None or not isinstance(dim, int) or not isinstance(step, int):
            continue
        if before.shape == after.shape:
            node.replace_all_uses_with(source)
        elif step > 1 and before.dim() == 4 and dim % 4 in (2, 3):
            with graph.inserting_before(node):
                narrow = source
                if isinstance(start, int) and start % before.shape[dim]:
                    narrow = graph.call_function(_slice, (source, dim, start, end, 1))
                strides = [step, 1] if dim % 4 == 2 else [1, step]
                pooled = graph.call_function(_pool, (narrow, [1, 1], strides))
            pooled.meta = dict(node.meta)
            node.replace_all_uses_with(pooled)
    graph.eliminate_dead_code()


def properties_as_transpose_(graph: fx.Graph) -> None:
    """Replace x.mT, x.T and torch.t(x), unknown to pnnx, by a transpose of two dimensions."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _TRANSPOSED:
            continue
        value = _value(node)
        if value is None or value.dim() < 2:
            node.replace_all_uses_with(node.args[0])
        else:
            with graph.inserting_before(node):
                swapped = graph.call_function(_transpose, (node.args[0], -2, -1))
            swapped.meta = dict(node.meta)
            node.replace_all_uses_with(swapped)
    graph.eliminate_dead_code()


def _value(node: object) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None
