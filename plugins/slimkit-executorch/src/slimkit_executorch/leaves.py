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
    Steps,
    add_constant,
    arguments,
    constant_of,
    integer_layers,
    only_reader,
    shape_of,
    tensor_of,
)

_aten, _ops = torch.ops.aten, torch.ops.quantized_decomposed
_EPS = 2.0**-23  # least scale that torch's own search for a range gives; XNNPACK has none
_CHANNELS_LAST = frozenset(
    {_aten.conv2d.default, _aten.conv2d.padding, _aten.max_pool2d.default}
    | {_aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default, _aten.mean.dim}
)
"""What XNNPACK gives images of with the channels in the last dimension."""
_EITHER = frozenset(
    {QUANTIZE, DEQUANTIZE, *ACTIVATIONS, _aten.add.Tensor, _aten.mul.Tensor, _aten.sub.Tensor}
    | {_aten.hardswish.default, _aten.sigmoid.default, _aten.silu.default, _aten.cat.default}
)
"""What keeps the order of the dimensions that its inputs have."""


def pin_ranges_(module: GraphModule) -> None:
    """Make every integer layer that gives float one of XNNPACK's, or a float one where it has none.

    It has none for depthwise and grouped convolutions, and where one reads what was reshaped, say,
    ExecuTorch 1.5 mixes up the order of the dimensions. The weights of these become float
    constants, which leaves the numbers as they are.
    """
    for layer in [*_giving_float(module)]:
        source = layer.args[0]
        assert isinstance(source, Node)
        if source.target is DEQUANTIZE and _can_be_pinned(layer, source):
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


def _can_be_pinned(layer: Node, source: Node) -> bool:
    if layer.target is _aten.linear.default:
        return True
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    whole = arguments(layer, names, (None,) * 6 + (1,))[6] == 1
    return whole and _channels_last(source)


def _channels_last(node: Node) -> bool:
    if node.target in _CHANNELS_LAST:
        made = node.meta.get("val")  # what a rewrite has made has none, and four dimensions
        return made is None or made.dim() == 4
    return node.target in _EITHER and all(map(_channels_last, node.all_input_nodes))


def _pin_(module: GraphModule, layer: Node, source: Node) -> None:
    graph, weight = module.graph, layer.args[1]
    steps = Steps.of(source)
    low, high = steps.low, steps.high
    ends = [(e - steps.zero_point) * steps.scale for e in (low, high) if e != steps.zero_point]
    assert isinstance(weight, Node)
    integers = tensor_of(module, weight.all_input_nodes[0])
    unread = integers.new_zeros(len(integers), len(ends), *integers.shape[2:])
    rank = len(shape_of(source))
    behind = [0, 0] * (0 if layer.target is _aten.linear.default else rank - 2)
    constant = add_constant(module, torch.cat([integers, unread], 1), layer)
    with graph.inserting_before(layer):
        x = source
        for end in ends:  # 0 is in every range, and padding with it means something else
            x = graph.call_function(_aten.constant_pad_nd.default, (x, [*behind, 0, 1], end))
        found = graph.call_function(_ops.choose_qparams.tensor, (x, low, high, _EPS, steps.dtype))
        grid = [graph.call_function(operator.getitem, (found, n)) for n in (0, 1)]
        x = graph.call_function(_ops.quantize_per_tensor.tensor, (x, *grid, low, high, steps.dtype))
        x = graph.call_function(
            _ops.dequantize_per_tensor.tensor, (x, *grid, low, high, steps.dtype)
        )
        w = graph.call_function(_ops.dequantize_per_channel.default, (constant, *weight.args[1:]))
    layer.args = (x, w, *layer.args[2:])
