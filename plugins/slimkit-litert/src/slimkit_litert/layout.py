"""Takes needless transposes and paddings out.

Torch puts channels in front of positions, TFLite behind them. litert-torch's own pass turns the
operations that it knows; paddings and means of torch are not among them, and stand between a
transpose and its inverse. A padding in front of a layer may be the one that TFLite calls SAME.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from slimkit_litert.graph import Graph

_CHANNELS_LAST = (0, 2, 3, 1)
_SINKS = frozenset({"PAD", "LOGISTIC", "TANH", "RELU", "RELU6", "HARD_SWISH", "ADD", "SUB", "MUL"})


def straighten_(graph: Graph) -> None:
    """Move transposes backward until they meet their inverse, and drop both."""
    changed = True
    while changed:
        graph.drop_unread()
        changed = False
        for operator in list(graph.operators):
            for rewrite in (_merged, _averaged, _sunk):
                changed = rewrite(graph, operator) or changed
    for operator in list(graph.operators):
        _raise_over_padding(graph, operator)
    for operator in graph.operators:
        _pad_within(graph, operator)
    graph.drop_unread()


def _raise_over_padding(graph: Graph, operator: Any) -> None:
    """Put channels behind positions before, and not after, what pads the model's input."""
    order, before = _order(graph, operator), graph.makers().get(operator.inputs[0])
    if order != _CHANNELS_LAST or before is None or graph.kind(before) != "PAD":
        return
    padded, amounts = operator.inputs[0], graph.constant(before.inputs[1])
    if amounts is None or len(graph.readers()[padded]) != 1 or padded in graph.graph.outputs:
        return
    source, given = before.inputs[0], operator.outputs[0]
    turned = _new(graph, [graph.shape(source)[n] for n in order], source)
    operator.inputs, operator.outputs = [source, operator.inputs[1]], [turned]
    before.inputs = [turned, _numbers(graph, amounts[list(order)].tolist())]
    before.outputs = [given]
    first, second = sorted((graph.operators.index(before), graph.operators.index(operator)))
    graph.operators[first], graph.operators[second] = operator, before


def _pad_within(graph: Graph, operator: Any) -> None:
    """Let a layer do the padding in front of it, if it is the one that TFLite calls SAME.

    A layer on integers pads with its input's zero point, and in less than the time of a copy.
    """
    if graph.kind(operator) not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        return
    before, options = graph.makers().get(operator.inputs[0]), operator.builtinOptions
    if before is None or graph.kind(before) != "PAD" or options.padding != schema.Padding.VALID:
        return
    amounts = graph.constant(before.inputs[1])
    sizes = graph.shape(before.inputs[0])[1:3]
    kernel = graph.shape(operator.inputs[1])[1:3]
    strides = (options.strideH, options.strideW)
    dilations = (options.dilationHFactor, options.dilationWFactor)
    same = [[0, 0]]
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        same.append([total // 2, total - total // 2])
    if amounts is not None and amounts.tolist() == [*same, [0, 0]]:
        operator.inputs = [before.inputs[0], *operator.inputs[1:]]
        options.padding = schema.Padding.SAME


def _order(graph: Graph, operator: Any) -> tuple[int, ...] | None:
    """The order of dimensions that a transpose gives."""
    if operator is None or graph.kind(operator) != "TRANSPOSE":
        return None
    order = graph.constant(operator.inputs[1])
    return None if order is None else tuple(order.tolist())


def _merged(graph: Graph, operator: Any) -> bool:
    """Make one of two transposes in a row, and none of one that changes nothing."""
    order = _order(graph, operator)
    if order is None:
        return False
    if order == tuple(range(len(order))):
        if operator.outputs[0] in graph.graph.outputs and operator.inputs[0] in graph.graph.inputs:
            return False
        graph.operators.remove(operator)
        graph.replace(operator.outputs[0], operator.inputs[0])
        return True
    before = graph.makers().get(operator.inputs[0])
    first = _order(graph, before)
    if before is None or first is None:
        return False
    both = [first[n] for n in order]
    operator.inputs = [before.inputs[0], _numbers(graph, both)]
    return True


def _averaged(graph: Graph, operator: Any) -> bool:
    """Take the mean of what was not yet transposed."""
    if graph.kind(operator) != "MEAN" or operator.builtinOptions.keepDims:
        return False
    before = graph.makers().get(operator.inputs[0])
    order, axes = _order(graph, before), graph.constant(operator.inputs[1])
    if before is None or order is None or axes is None:
        return False
    gone = {order[axis] for axis in axes.reshape(-1).tolist()}
    left = [axis for axis in order if axis not in gone]
    if left != sorted(left):
        return False
    operator.inputs = [before.inputs[0], _numbers(graph, sorted(gone))]
    return True


def _sunk(graph: Graph, operator: Any) -> bool:
    """Let an operator read what was not yet transposed, and transpose what it gives."""
    kind = graph.kind(operator)
    if kind not in _SINKS or len(operator.outputs) != 1:
        return False
    reads = 2 if kind in ("ADD", "SUB", "MUL") else 1
    makers, readers = graph.makers(), graph.readers()
    before: list[Any] = [makers.get(t) for t in operator.inputs[:reads]]
    orders = {_order(graph, maker) for maker in before}
    order = next(iter(orders))
    once = all(len(set(map(id, readers[t]))) == 1 for t in operator.inputs[:reads])
    if len(orders) != 1 or order is None or not once:
        return False
    sources = [maker.inputs[0] for maker in before]
    if len({graph.shape(t) for t in sources}) != 1:  # they are spread, along other dimensions then
        return False
    rest = operator.inputs[reads:]
    back = [order.index(n) for n in range(len(order))]
    if kind == "PAD":
        amounts = graph.constant(rest[0])
        if amounts is None:
            return False
        rest = [_numbers(graph, amounts[back].tolist())]
    given = operator.outputs[0]
    made = _new(graph, [graph.shape(given)[n] for n in back], given)
    operator.inputs, operator.outputs = [*sources, *rest], [made]
    behind = graph.new("TRANSPOSE", [made, _numbers(graph, list(order))], [given])
    graph.operators.insert(graph.operators.index(operator) + 1, behind)
    return True


def _new(graph: Graph, shape: list[int], like: int) -> int:
    """A tensor of another shape on the grid of `like`, or as floats."""
    step = graph.step(like)
    sizes, zeros = (None, [0]) if step is None else ([step.size], [step.zero])
    return graph.add(shape, np.float32 if step is None else np.int8, sizes, zeros)


def _numbers(graph: Graph, values: list[Any]) -> int:
    """A constant of the graph."""
    array = np.array(values, np.int32)
    return graph.add(array.shape, np.int32, values=array)
