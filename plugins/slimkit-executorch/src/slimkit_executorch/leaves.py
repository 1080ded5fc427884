"""Integer layers whose output is not rounded: the last ones of a model, which give float.

XNNPACK's static integer kernels give integers only. Its kernels for dynamic quantization give
float: they find the range of their input as they run, round it to int8 with a zero point, sum
integers and scale the sums to float32. Here that range is pinned: two more input channels hold the
ends of the simulated range, their weights are zero, and so the kernel finds the scale and the
zero point of the simulation, whatever the input.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from slimkit_executorch.graph import (
    ACTIVATIONS,
    DEQUANTIZE,
    QUANTIZE,
    add_constant,
    constant_of,
    integer_layers,
    only_reader,
    shape_of,
    tensor_of,
)

_aten, _ops = torch.ops.aten, torch.ops.quantized_decomposed
_EPS = 2.0**-23  # least scale that torch's own search for a range gives; XNNPACK has none
_PINNED = frozenset({_aten.linear.default, _aten.conv2d.default})


def pin_ranges_(module: GraphModule) -> None:
    """Make every integer layer that gives float one of XNNPACK's, or a float one where it has none.

    It has none for depthwise, grouped, transposed and one-dimensional convolutions: their weights
    become float constants, which leaves the numbers as they are.
    """
    for layer in [*_giving_float(module)]:
        source = layer.args[0]
        assert isinstance(source, Node)
        if layer.target in _PINNED and source.target is DEQUANTIZE and _groups(layer) == 1:
            _pin_(module, layer, source)
        else:
            to_float_(module, layer)
    module.graph.eliminate_dead_code()


def to_float_(module: GraphModule, layer: Node) -> None:
    """Give a layer its weight as a float constant."""
    weight = layer.args[1]
    assert isinstance(weight, Node)
    value = constant_of(module, weight)
    assert value is not None
    layer.update_arg(1, add_constant(module, value, layer))


def _giving_float(module: GraphModule) -> Iterator[Node]:
    for layer in integer_layers(module):
        reader = only_reader(layer)
        if reader is not None and reader.target in ACTIVATIONS:
            reader = only_reader(reader)
        if reader is None or reader.target is not QUANTIZE:
            yield layer


def _groups(layer: Node) -> int:
    if layer.target is _aten.linear.default:
        return 1
    groups = layer.args[6] if len(layer.args) > 6 else layer.kwargs.get("groups", 1)
    assert isinstance(groups, int)
    return groups


def _pin_(module: GraphModule, layer: Node, source: Node) -> None:
    graph, weight = module.graph, layer.args[1]
    _, scale, zero_point, low, high, dtype = source.args
    assert isinstance(weight, Node)
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    assert isinstance(low, int)
    assert isinstance(high, int)
    ends = [(end - zero_point) * scale for end in (low, high) if end != zero_point]
    integers = tensor_of(module, weight.all_input_nodes[0])
    unread = integers.new_zeros(len(integers), len(ends), *integers.shape[2:])
    rank = len(shape_of(source))
    behind = [0, 0] * (0 if layer.target is _aten.linear.default else rank - 2)
    constant = add_constant(module, torch.cat([integers, unread], 1), layer)
    with graph.inserting_before(layer):
        x = source
        for end in ends:  # 0 is in every range, and padding with it means something else
            x = graph.call_function(_aten.constant_pad_nd.default, (x, [*behind, 0, 1], end))
        found = graph.call_function(_ops.choose_qparams.tensor, (x, low, high, _EPS, dtype))
        grid = [graph.call_function(operator.getitem, (found, n)) for n in (0, 1)]
        x = graph.call_function(_ops.quantize_per_tensor.tensor, (x, *grid, low, high, dtype))
        x = graph.call_function(_ops.dequantize_per_tensor.tensor, (x, *grid, low, high, dtype))
        w = graph.call_function(_ops.dequantize_per_channel.default, (constant, *weight.args[1:]))
    layer.args = (x, w, *layer.args[2:])
