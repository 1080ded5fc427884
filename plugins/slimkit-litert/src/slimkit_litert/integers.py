"""Turns operators between roundings into integer operators, with the ranges that slimkit chose.

The converter leaves the float graph with QUANTIZE and DEQUANTIZE around its operators, and every
layer's weights as a constant behind such a pair. An operator whose inputs come from integers and
whose output is rounded reads and writes the integers instead
(https://ai.google.dev/edge/litert/models/quantization_spec). Whatever else reads integers gets
them dequantized once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from slimkit_litert.graph import Graph, Step
from slimkit_litert.roundings import LOW, MOVES, integers, is_plain

_WEIGHTED = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
"""Layers that read (input, weight, bias): name to the weight's dimension of output channels."""

_PAIRS = frozenset({"ADD", "SUB", "MUL"})
_SINGLE = frozenset({"MEAN", "LOGISTIC", "TANH"})
_FIXED = {"LOGISTIC": Step(1 / 256, -128), "TANH": Step(1 / 128, 0)}
"""Outputs whose grid the runtime prescribes."""

_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "RESHAPE": 1}
"""From which version on an operator takes int8, where that is not 2."""

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class _Weight:
    """A constant of integers.

    Args:
        integers: its values.
        sizes: of the step of each value, the same shape.
    """

    integers: np.ndarray
    sizes: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """What the integers stand for."""
        return (self.integers * self.sizes).astype(np.float32)


def integrate_(graph: Graph) -> None:
    """Let the operators between roundings compute on integers."""
    _Integration(graph).run()
    graph.drop_unread()
    for operator in graph.operators:
        if any(graph.is_integer(t) for t in operator.inputs if t >= 0):
            code = graph.model.operatorCodes[operator.opcodeIndex]
            code.version = max(code.version, _VERSIONS.get(graph.kind(operator), 2))


def integrate_borders_(graph: Graph) -> None:
    """Let the file take and give the integers that are read and made at its borders."""
    readers = graph.readers()
    for x in list(graph.graph.inputs):
        (first, *others) = readers.get(x, [None])
        if first is not None and not others and graph.kind(first) == "QUANTIZE":
            graph.replace_input(x, first.outputs[0])
            graph.operators.remove(first)
    makers = graph.makers()
    for y in set(graph.graph.outputs):
        last = makers.get(y)
        if last is not None and graph.kind(last) == "DEQUANTIZE":
            graph.replace_output(y, last.inputs[0])
    graph.drop_unread()


class _Integration:
    """One walk over the operators in their order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.readers = graph.readers()
        self.leaving = set(graph.graph.outputs)
        self.low: dict[int, int] = {}  # float tensor -> int8 tensor of the same values
        self.same: dict[int, int] = {}  # int8 tensor -> the one that is there in its place
        self.weights: dict[int, _Weight] = {}
        self.floats: set[int] = set()  # of `low`, those that are there as floats, too
        self.made: list[Any] = []

    def run(self) -> None:
        for operator in self.graph.operators:
            operator.inputs = [self.same.get(t, t) for t in operator.inputs]
            kind = self.graph.kind(operator)
            if not (
                self._is_rounding(kind, operator)
                or self._is_constant(kind, operator)
                or self._is_moved(kind, operator)
                or self._is_integer(kind, operator)
            ):
                self._is_float(operator)
        for tensor in sorted(self.leaving):
            self._as_float(tensor)
        self.graph.operators = self.made

    def _is_rounding(self, kind: str, operator: Any) -> bool:
        if kind not in ("QUANTIZE", "DEQUANTIZE"):
            return False
        x, y = operator.inputs[0], operator.outputs[0]
        if kind == "DEQUANTIZE" and x in self.weights:
            self.weights[y] = self.weights[x]
        elif kind == "DEQUANTIZE" and self.graph.is_integer(x):
            self.low[y] = x
        elif kind == "QUANTIZE" and self.graph.constant(x) is not None:
            self.weights[y] = self._rounded(x, y)
        elif kind == "QUANTIZE" and x in self.low:
            if self.graph.step(self.low[x]) == self.graph.step(y):
                self.same[y] = self.low[x]
            else:  # XNNPACK's own change of grid has factors of 8 bits: a tenth of all go elsewhere
                self._is_float(operator)
        else:
            return False
        return True

    def _rounded(self, constant: int, target: int) -> _Weight:
        """A constant on the grid of `target`; weights have no zero point."""
        values, scales = self.graph.constant(constant), self.graph.scales(target)
        assert values is not None
        assert scales is not None
        shape = [-1 if n == scales[1] else 1 for n in range(values.ndim)]
        sizes = np.broadcast_to(scales[0].reshape(shape), values.shape)
        return _Weight(np.rint(values / sizes).astype(np.int8), sizes)

    def _is_constant(self, kind: str, operator: Any) -> bool:
        """Move a weight's integers now."""
        inputs = list(operator.inputs)
        if not inputs or inputs[0] not in self.weights:
            return False
        weight, y = self.weights[inputs[0]], operator.outputs[0]
        if kind in ("RESHAPE", "SQUEEZE", "EXPAND_DIMS"):
            shape = self.graph.shape(y)
            moved = [part.reshape(shape) for part in (weight.integers, weight.sizes)]
        elif kind == "TRANSPOSE":
            order = self.graph.constant(inputs[1])
            moved = [part.transpose(order) for part in (weight.integers, weight.sizes)]
        elif kind == "REVERSE_V2":
            given = self.graph.constant(inputs[1])
            axes = () if given is None else tuple(given.reshape(-1).tolist())
            moved = [np.flip(part, axes) for part in (weight.integers, weight.sizes)]
        else:
            return False
        self.weights[y] = _Weight(*moved)
        return True

    def _is_moved(self, kind: str, operator: Any) -> bool:
        if kind == "PADV2":
            return self._is_surrounded(operator)
        if kind not in MOVES or not is_plain(operator):
            return False
        x = operator.inputs[MOVES[kind]]
        if x in self.low:
            operator.inputs[MOVES[kind]] = self.low[x]
            step = self.graph.step(self.low[x])
            for n, y in enumerate(list(operator.outputs)):
                self.low[y] = operator.outputs[n] = self.graph.like(y, step)
        elif not self.graph.is_integer(x):
            return False
        self.made.append(operator)
        return True

    def _is_surrounded(self, operator: Any) -> bool:
        """Pad with a number that is on the grid, or need not be for what reads it."""
        (x, amounts, value), y = operator.inputs, operator.outputs[0]
        fill = self.graph.constant(value)
        step = self.graph.step(self.low[x]) if x in self.low else None
        if fill is None or step is None:
            return False
        filled = integers(fill, step)
        number = (filled.astype(np.float64) - step.zero) * step.size
        least = bool((fill <= (LOW - step.zero) * step.size).all())
        clipped = y not in self.leaving and all(
            (self.graph.kind(o) == "QUANTIZE" and self.graph.step(o.outputs[0]) == step)
            or (least and self.graph.kind(o) == "MAX_POOL_2D")
            for o in self.readers.get(y, [])
        )
        if not (clipped or np.array_equal(number, fill)):
            return False
        constant = self.graph.add(
            self.graph.shape(value), np.int8, [step.size], [step.zero], values=filled
        )
        self.low[y] = self.graph.like(y, step)
        operator.inputs, operator.outputs = [self.low[x], amounts, constant], [self.low[y]]
        self.made.append(operator)
        return True

    def _is_integer(self, kind: str, operator: Any) -> bool:
        y = operator.outputs[0]
        target = self._rounding_of(y)
        if target is None or len(operator.outputs) != 1:
            return False
        if kind in _WEIGHTED:
            fits = self._takes_weights(operator, _WEIGHTED[kind])
        elif kind == "CONCATENATION":
            fits = self._takes_parts(operator, target)
        elif kind == "AVERAGE_POOL_2D":
            fits = self._takes_windows(operator)
        elif kind in _PAIRS or kind in _SINGLE:
            fits = self._takes_integers(kind, operator, target)
        else:
            return False
        if fits:
            operator.outputs = [target]
            self.low[y] = target
            self.made.append(operator)
        return fits

    def _rounding_of(self, tensor: int) -> int | None:
        """The integers that a tensor becomes, if all that reads it rounds it to the same grid."""
        readers = self.readers.get(tensor, [])
        rounded = [o.outputs[0] for o in readers if self.graph.kind(o) == "QUANTIZE"]
        if tensor in self.leaving or not readers or len(rounded) != len(readers):
            return None
        grids = {self.graph.step(t) for t in rounded}
        return rounded[0] if len(grids) == 1 and None not in grids else None

    def _takes_weights(self, operator: Any, axis: int) -> bool:
        """Integer input, weights and bias of a layer."""
        x, w, *rest = operator.inputs
        step = self.graph.step(self.low[x]) if x in self.low else None
        if step is None or w not in self.weights:
            return False
        weight = self.weights[w]
        sizes = np.moveaxis(weight.sizes, axis, 0).reshape(weight.sizes.shape[axis], -1)
        if not (sizes == sizes[:, :1]).all():
            return False
        scales = sizes[:, 0].astype(np.float32)
        inputs = [self.low[x]]
        inputs.append(
            self.graph.add(
                weight.integers.shape, np.int8, scales, axis=axis, values=weight.integers
            )
        )
        if rest and rest[0] >= 0:
            bias = self.graph.constant(rest[0])
            if bias is None:
                return False
            inputs.append(self._bias(bias, np.float32(step.size) * scales))
        operator.inputs = inputs
        return True

    def _bias(self, bias: np.ndarray, sizes: np.ndarray) -> int:
        """A bias in steps of the sums of products."""
        values = np.rint(bias.astype(np.float64).reshape(-1) / sizes.astype(np.float64))
        values = values.clip(-_INT32, _INT32).astype(np.int32)
        return self.graph.add(values.shape, np.int32, sizes, values=values)

    def _takes_parts(self, operator: Any, target: int) -> bool:
        """Parts of a concatenation, each on the grid of the whole."""
        parts = list(operator.inputs)
        if not is_plain(operator) or not all(part in self.low for part in parts):
            return False
        step = self.graph.step(target)
        fitting: dict[int, int] = {}
        for part in parts:
            low = self.low[part]
            if low not in fitting and self.graph.step(low) != step:
                fitting[low] = self.graph.like(low, step)
                self._is_float(self.graph.new("QUANTIZE", [part], [fitting[low]]))
        operator.inputs = [fitting.get(self.low[part], self.low[part]) for part in parts]
        return True

    def _takes_windows(self, operator: Any) -> bool:
        """Means of windows.

        The runtime's own operator keeps the grid of its input and rounds halves up. A depthwise
        convolution of ones sums the windows and scales the sums to any grid, ten times as fast.
        """
        x, options = operator.inputs[0], operator.builtinOptions
        padded = options.padding != schema.Padding.VALID
        if x not in self.low or padded or not is_plain(operator):
            return False
        operator.inputs = [self.low[x]]
        channels, window = self.graph.shape(x)[-1], (options.filterHeight, options.filterWidth)
        ones = np.ones((1, *window, channels), np.int8)
        sizes = np.full(channels, 1 / (window[0] * window[1]), np.float32)
        operator.inputs.append(self.graph.add(ones.shape, np.int8, sizes, axis=3, values=ones))
        zeros, step = np.zeros(channels), self.graph.step(self.low[x])
        assert step is not None
        operator.inputs.append(self._bias(zeros, np.float32(step.size) * sizes))
        operator.opcodeIndex = self.graph.new("DEPTHWISE_CONV_2D", [], []).opcodeIndex
        operator.builtinOptionsType = schema.BuiltinOptions.DepthwiseConv2DOptions
        operator.builtinOptions = depthwise = schema.DepthwiseConv2DOptionsT()
        depthwise.padding, depthwise.depthMultiplier = options.padding, 1
        depthwise.strideH, depthwise.strideW = options.strideH, options.strideW
        return True

    def _takes_integers(self, kind: str, operator: Any, target: int) -> bool:
        """Integers of any grid, and of the prescribed one where there is one."""
        if kind in _FIXED and self.graph.step(target) != _FIXED[kind]:
            return False
        reads = 2 if kind in _PAIRS else 1
        inputs = list(operator.inputs)
        if not all(x in self.low for x in inputs[:reads]):
            return False
        operator.inputs = [*(self.low[x] for x in inputs[:reads]), *inputs[reads:]]
        return True

    def _is_float(self, operator: Any) -> None:
        """Give it floats."""
        inputs = list(operator.inputs)
        for n, x in enumerate(inputs):
            if x in self.weights:
                numbers = self.weights[x].numbers
                inputs[n] = self.graph.add(numbers.shape, np.float32, values=numbers)
            else:
                self._as_float(x)
        operator.inputs = inputs
        self.made.append(operator)

    def _as_float(self, tensor: int) -> None:
        """Let `tensor` be there as floats, dequantized once."""
        if tensor in self.low and tensor not in self.floats:
            self.floats.add(tensor)
            self.made.append(self.graph.new("DEQUANTIZE", [self.low[tensor]], [tensor]))
