"""Rewrites of an ATen graph after which XNNPACK's partitioner knows its integer layers.

The partitioner takes an operation as an integer one where each of its inputs is dequantized for it
alone and its only reader, behind a ReLU at most, quantizes its output. Everything here keeps the
numbers: the graph computes the same integers before and after.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from slimkit_executorch.graph import (
    ACTIVATIONS,
    DEQUANTIZE,
    DEQUANTIZE_CONSTANT,
    LAYERS,
    QUANTIZE,
    Steps,
    add_constant,
    arguments,
    constant_of,
    only_reader,
    replace,
    rounded,
    shape_of,
)
from slimkit_executorch.views import (
    drop_idle_slices_,
    flatten_softmax_,
    multiply_in_one_batch_,
    split_by_slices_,
    widen_convolutions_,
)

_aten = torch.ops.aten


_OUT_OF_PLACE: dict[object, torch._ops.OpOverload] = {
    _aten.relu_.default: _aten.relu.default,
    _aten.relu6_.default: _aten.relu6.default,
    _aten.hardtanh_.default: _aten.hardtanh.default,
    _aten.clamp_.default: _aten.clamp.default,
    _aten.add_.Tensor: _aten.add.Tensor,
    _aten.sub_.Tensor: _aten.sub.Tensor,
    _aten.mul_.Tensor: _aten.mul.Tensor,
}

_NEW = LAYERS | {
    _aten.conv1d.default, _aten.conv_transpose2d.input, _aten.add.Tensor, _aten.sub.Tensor,
    _aten.mul.Tensor, _aten.cat.default, _aten.mean.dim, _aten.batch_norm.default, DEQUANTIZE,
}  # fmt: skip
"""Operations that give new memory, not a view of what they read."""


def rewrite_(module: GraphModule) -> None:
    """All rewrites but those of layers that give float (`leaves`)."""
    compute_out_of_place_(module)
    name_activations_(module)
    spell_hardsigmoids_(module)
    drop_idle_activations_(module)
    drop_idle_slices_(module)
    split_by_slices_(module)
    move_in_front_of_slices_(module)
    multiply_in_one_batch_(module)
    flatten_softmax_(module)
    widen_convolutions_(module)
    fold_biases_(module)
    move_in_front_of_concatenations_(module)
    keep_pooled_dimensions_(module)
    pad_integers_(module)
    dequantize_for_each_reader_(module)
    module.graph.eliminate_dead_code()


def compute_out_of_place_(module: GraphModule) -> None:
    """Write sums and activations that overwrite what a layer, a sum or a rounding gives as others.

    The layer in front of one would have two readers, and the partitioner would leave it in float.
    What others give may be a view of a tensor that is read again.
    """
    for node in module.graph.nodes:
        twin = _OUT_OF_PLACE.get(node.target)
        if twin is not None and _is_alone(node):
            node.target = twin


def name_activations_(module: GraphModule) -> None:
    """Write ReLU6 and clamps as the operations that the partitioner merges into a layer."""
    graph = module.graph
    for node in [*graph.nodes]:
        if node.target is _aten.relu6.default:
            low, high = 0.0, 6.0
        elif node.target is _aten.clamp.default and node.meta["val"].is_floating_point():
            low, high = arguments(node, ("self", "min", "max"))[1:]
        else:
            continue
        with graph.inserting_before(node):
            if low == 0 and high is None:
                made = graph.call_function(_aten.relu.default, node.args[:1])
            elif low is not None and high is not None:
                made = graph.call_function(_aten.hardtanh.default, (node.args[0], low, high))
            else:
                continue
        replace(node, made)


def spell_hardsigmoids_(module: GraphModule) -> None:
    """Write a hard-sigmoid as ExecuTorch does, but without its two copies to the type it has."""
    graph = module.graph
    for node in [*graph.nodes]:
        if node.target not in (_aten.hardsigmoid.default, _aten.hardsigmoid_.default):
            continue
        if node.target is _aten.hardsigmoid_.default and not _is_alone(node):
            continue
        if not node.meta["val"].is_floating_point():
            continue
        with graph.inserting_before(node):
            made = graph.call_function(_aten.add.Tensor, (node.args[0], 3.0))
            made = graph.call_function(_aten.hardtanh.default, (made, 0.0, 6.0))
            made = graph.call_function(_aten.div.Tensor, (made, 6.0))
        replace(node, made)


def drop_idle_activations_(module: GraphModule) -> None:
    """Leave out a ReLU whose bounds are those of the grid that its values are rounded to.

    Rounding clips as well; behind a sum XNNPACK would clip in a pass of its own.
    """
    for node in [*module.graph.nodes]:
        rounding = only_reader(node)
        if node.target not in ACTIVATIONS or rounding is None or rounding.target is not QUANTIZE:
            continue
        steps = Steps.of(rounding)
        low, high = 0.0, math.inf
        if node.target is _aten.hardtanh.default:
            low, high = arguments(node, ("self", "min_val", "max_val"), (None, -1.0, 1.0))[1:]
        if steps.integer(low) > steps.low:
            continue
        if high == math.inf or steps.integer(high) >= steps.high:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def fold_biases_(module: GraphModule) -> None:
    """Write integer biases as float constants.

    ExecuTorch turns the bias of an integer layer into integers of scale input * weight itself, and
    a float32 that is an integer times that scale into this very integer, below 2**24.
    """
    for node in [*module.graph.nodes]:
        if node.target is DEQUANTIZE_CONSTANT:
            value = constant_of(module, node, torch.int32)
            if value is not None:
                node.replace_all_uses_with(add_constant(module, value, node))


def move_in_front_of_slices_(module: GraphModule) -> None:
    """Round what is sliced instead of the slice, so that what gives it computes on integers."""
    for node in [*module.graph.nodes]:
        rounding = only_reader(node)
        if node.target is not _aten.slice.Tensor or rounding is None:
            continue
        source = _read(node)
        if rounding.target is not QUANTIZE or len(source.users) > 1:
            continue
        if source.target is not DEQUANTIZE:
            with module.graph.inserting_before(node):
                made = rounded(module, source, rounding.args[1:])
            made.meta = dict(source.meta)
            node.replace_input_with(source, made)


def move_in_front_of_concatenations_(module: GraphModule) -> None:
    """Round each part of a concatenation instead of the whole, so that bytes are put together."""
    graph = module.graph
    for node in [*graph.nodes]:
        rounding = only_reader(node)
        if node.target is not _aten.cat.default or rounding is None:
            continue
        parts = node.args[0]
        assert isinstance(parts, list | tuple)
        integer = all(isinstance(p, Node) and p.target is DEQUANTIZE for p in parts)
        if rounding.target is not QUANTIZE or not integer:
            continue
        grid = rounding.args[1:]
        moved = []
        with graph.inserting_before(node):
            for part in parts:
                if part.args[1:] != grid:
                    part = rounded(module, part, grid)
                moved.append(part)
        node.args = (moved, *node.args[1:])


def keep_pooled_dimensions_(module: GraphModule) -> None:
    """Write a mean over height and width so that it keeps them, and reshape behind its rounding."""
    graph = module.graph
    for node in [*graph.nodes]:
        if node.target is not _aten.mean.dim or (len(node.args) > 2 and node.args[2]):
            continue
        source, dims = node.args[:2]
        assert isinstance(source, Node)
        if len(shape_of(source)) != 4 or not isinstance(dims, list | tuple):
            continue
        if sorted(d % 4 for d in dims if isinstance(d, int)) != [2, 3] or node.kwargs:
            continue
        rounding = only_reader(node)
        with graph.inserting_before(node):
            made = graph.call_function(_aten.mean.dim, (source, [2, 3], True))
            if rounding is not None and rounding.target is QUANTIZE:
                made = rounded(module, made, rounding.args[1:])
            made = graph.call_function(_aten.reshape.default, (made, [*shape_of(node)]))
        replace(node, made)


def _is_alone(node: Node) -> bool:
    """Whether what it reads is new memory that nobody else reads."""
    return len(_read(node).users) == 1 and _read(node).target in _NEW


def _read(node: Node) -> Node:
    """What an operation reads first."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def pad_integers_(module: GraphModule) -> None:
    """Leave out the rounding of what was only padded with zeros, for XNNPACK to pad integers.

    The partitioner takes such a padding together with the convolution behind it. Behind any other
    that reads what was rounded, ExecuTorch gives integers to whoever reads it, in float or not,
    unless it is rounded once more, which changes nothing.
    """
    for node in [*module.graph.nodes]:
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or source.target is not DEQUANTIZE:
            continue
        if not _pads_with_zeros(node):
            continue
        grid, rounding = source.args[1:], only_reader(node)
        if rounding is None or rounding.target is not QUANTIZE:
            with module.graph.inserting_after(node):
                there = module.graph.call_function(QUANTIZE, (node, *grid))
            with module.graph.inserting_after(there):
                back = module.graph.call_function(DEQUANTIZE, (there, *grid))
            node.replace_all_uses_with(back, delete_user_cb=lambda user, own=there: user is not own)
            back.meta = dict(node.meta)
            rounding = there
        if rounding.args[1:] != grid:
            continue
        for back in [*rounding.users]:
            for reader in [*back.users]:
                if reader.target in LAYERS and reader.args[0] is back:
                    with module.graph.inserting_before(reader):
                        own = module.graph.node_copy(node)
                    reader.replace_input_with(back, own)


def _pads_with_zeros(node: Node) -> bool:
    if node.target is _aten.constant_pad_nd.default:
        return not arguments(node, ("self", "pad", "value"))[2]
    if node.target is not _aten.pad.default:
        return False
    names = ("self", "pad", "mode", "value")
    mode, value = arguments(node, names, (None, None, "constant"))[2:]
    return mode == "constant" and not value


def dequantize_for_each_reader_(module: GraphModule) -> None:
    """Give each reader a dequantization of its own: one may compute on integers, another not."""
    for node in [*module.graph.nodes]:
        if node.target is not DEQUANTIZE:
            continue
        for reader in [*node.users][1:]:
            with module.graph.inserting_before(node):
                own = module.graph.node_copy(node)
            reader.replace_input_with(node, own)
