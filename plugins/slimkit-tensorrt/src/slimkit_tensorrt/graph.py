"""Who makes and who reads each tensor of an ONNX graph."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


class Graph:
    """An ONNX model's main graph by the names of its tensors.

    Args:
        model: not changed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {name: node for node in self.nodes for name in node.output}
        self._readers = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._readers[name].append(node)
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """The values of a tensor that is a constant of the file."""
        found = self._constants.get(tensor)
        return None if found is None else numpy_helper.to_array(found)

    def producer(self, tensor: str) -> Any:
        """The node that makes a tensor, or None where it is an input or a constant."""
        return self._producers.get(tensor)

    def readers(self, tensor: str) -> list[Any]:
        """The nodes that read a tensor."""
        return self._readers[tensor]

    def attribute(self, node: Any, name: str, default: int) -> int:
        """An attribute that is a whole number."""
        return next((a.i for a in node.attribute if a.name == name), default)

    def name(self, node: Any) -> str:
        """What to call a node in a message."""
        return f"{node.op_type} {node.name or node.output[0]}"


_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def integer_layers(file: bytes) -> int:
    """How many layers read a rounded tensor and an int8 weight: what TensorRT computes in int8."""
    graph = Graph(onnx.load_from_string(file))
    layers = (n for n in graph.nodes if n.op_type in _LAYERS)
    return sum(all(_rounded(graph, name) is not None for name in node.input[:2]) for node in layers)


def _rounded(graph: Graph, tensor: str) -> Any:
    """The DequantizeLinear that a tensor comes from, be it transposed; None where there is none."""
    made = graph.producer(tensor)
    if made is not None and made.op_type == "Transpose":
        made = graph.producer(made.input[0])
    return made if made is not None and made.op_type == "DequantizeLinear" else None


def misfused(file: bytes) -> bool:
    """Whether ONNX Runtime, fusing roundings and layers to integers, would compute something else.

    It rounds the float weights of a layer that reads a rounded tensor, and every bias to the steps
    of its products, in 32 bits: where a channel's weights are next to nothing, they overflow.
    """
    graph = Graph(onnx.load_from_string(file))
    for node in graph.nodes:
        source = graph.producer(node.input[0]) if node.op_type in _LAYERS else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        weight = graph.constant(node.input[1])
        if weight is not None:
            if weight.dtype.kind == "f":
                return True
        elif len(node.input) > 2 and _overflows(graph, source, node):
            return True
    return False


def _overflows(graph: Graph, source: Any, layer: Any) -> bool:
    """Whether a bias is no 32-bit number of steps of its channel's products."""
    made = _rounded(graph, layer.input[1])
    if made is None:
        return False
    found = (graph.constant(name) for name in (source.input[1], made.input[1], layer.input[2]))
    known = [np.abs(values.astype(np.float64)) for values in found if values is not None]
    if len(known) < 3:
        return False
    read, weights, bias = known
    if weights.size > 1:  # of a transposed convolution, those of one group
        weights = np.tile(weights, bias.size // weights.size)
    return bool((bias > 2**30 * read * weights).any())
