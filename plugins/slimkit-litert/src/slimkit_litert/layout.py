"""Takes needless transposes out: torch puts channels in front of positions, TFLite behind them.

litert-torch's own pass does so for the operations that it knows; paddings and means of torch are
not among them, and stand between a transpose and its inverse.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit_litert.graph import Graph

_SINKS = frozenset({"PAD", "LOGISTIC", "TANH", "RELU", "RELU6", "HARD_SWISH", "ADD", "SUB", "MUL"})


def straighten_(graph: Graph) -> None:
    """Move transposes backward until they meet their inverse, and drop both."""
    changed = True
    while changed:
        graph.drop_unread()
        changed = any(
            _merged(graph, operator) or _averaged(graph, operator) or _sunk(graph, operator)
            for operator in list(graph.operators)
        )


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
    shape = [graph.shape(given)[n] for n in back]
    step = graph.step(given)
    sizes, zeros = (None, [0]) if step is None else ([step.size], [step.zero])
    made = graph.add(shape, np.float32 if step is None else np.int8, sizes, zeros)
    operator.inputs, operator.outputs = [*sources, *rest], [made]
    behind = graph.new("TRANSPOSE", [made, _numbers(graph, list(order))], [given])
    graph.operators.insert(graph.operators.index(operator) + 1, behind)
    return True


def _numbers(graph: Graph, values: list[Any]) -> int:
    """A constant of the graph."""
    array = np.array(values, np.int32)
    return graph.add(array.shape, np.int32, values=array)
