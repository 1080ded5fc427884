"""TensorRT's rules for quantized ONNX files, checked on a file.

What NVIDIA writes down and this checks, with the letter that each problem ends in:

- A: `IQuantizeLayer`, `IDequantizeLayer` (API reference, class nvinfer1::IQuantizeLayer): zero
  points are constants of zeros; scales are constants, strictly positive, and of the size of the
  axis; int8 saturates to [-128, 127].
- B: "Working with Quantized Types": quantization is symmetric; the types are INT8, INT4, FP8 and
  FP4, among them no unsigned ones.
- C: "Explicit Quantization", "Quantized Weights": integer weights need a dequantization between
  them and the layer.
- D: "Explicit Quantization", "Q/DQ Layer-Placement Recommendations": all inputs of a layer with
  weights are quantized; so is the input that a sum takes beside a convolution's output; weights
  have a scale per output channel.
- E: onnx-tensorrt, docs/operators.md: what the parser reads (no QLinear operators, zero points 0,
  2-D and 3-D convolutions).

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html,
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html,
https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from slimkit_tensorrt.graph import Graph

_WHERE = {
    "A": "IQuantizeLayer, API reference",
    "B": "Working with Quantized Types",
    "C": "Explicit Quantization: Quantized Weights",
    "D": "Explicit Quantization: Q/DQ Layer-Placement Recommendations",
    "E": "onnx-tensorrt: docs/operators.md",
}
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_UNREAD = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
    | {"Compress", "ConcatFromSequence", "Det", "MaxUnpool", "Multinomial", "SequenceAt"}
    | {"SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"}
    | {"SplitToSequence", "StringNormalizer", "TfIdfVectorizer", "Unique"}
)


def rules(model: onnx.ModelProto) -> list[str]:
    """What TensorRT would refuse, or run slower than it could, one sentence each.

    Each names the node, the rule, and where NVIDIA writes it down. A float model has no problems.

    Args:
        model: an ONNX model; not changed. Nodes without a name are called by their first output.
    """
    graph = Graph(model)
    return [
        f"{graph.name(node)}: {problem} ({_WHERE[place]})"
        for node in graph.nodes
        for place, problem in _problems(graph, node)
    ]


def _problems(graph: Graph, node: Any) -> Iterator[tuple[str, str]]:
    """Places of the documentation and problems of one node."""
    if node.op_type in _UNREAD:
        yield "E", f"the parser does not read {node.op_type}"
    elif node.op_type == "QuantizeLinear":
        yield from _parameters(graph, node)
        yield from _pair(graph, node)
    elif node.op_type == "DequantizeLinear":
        yield from _parameters(graph, node)
    elif node.op_type in _LAYERS:
        yield from _layer(graph, node)
    elif node.op_type == "Add":
        yield from _sum(graph, node)


def _parameters(graph: Graph, node: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with scale and zero point."""
    scale = graph.constant(node.input[1])
    if scale is None:
        yield "A", "its scale is computed: make it a constant"
    elif not (np.isfinite(scale) & (scale > 0)).all():
        yield "A", "its scale is not positive"
    zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2] and zero is None:
        yield "A", "its zero point is computed: make it a constant of zeros"
    elif zero is not None and zero.any():
        yield "A", "its zero point is not 0: quantize symmetrically"
    kind = _integers(graph, node, zero)
    if kind is not None and kind != np.int8:
        yield "B", f"its integers are {kind}, not int8"
    given = graph.constant(node.input[0])
    if scale is not None and scale.size > 1 and given is not None:
        axis = graph.attribute(node, "axis", 1)
        if scale.shape != (given.shape[axis],):
            yield "A", f"{scale.size} scales along axis {axis} of a tensor of {given.shape}"
    if scale is not None and scale.size > 1 and given is None:
        yield "D", "an activation has a scale per channel: give it one for the tensor"


def _integers(graph: Graph, node: Any, zero: NDArray[Any] | None) -> np.dtype[Any] | None:
    """The type of a node's integers, as far as the file says it."""
    if zero is not None:
        return zero.dtype
    if node.op_type == "QuantizeLinear":
        kind = graph.attribute(node, "output_dtype", onnx.TensorProto.UINT8) or 2
        return onnx.helper.tensor_dtype_to_np_dtype(kind)
    given = graph.constant(node.input[0])
    return None if given is None else given.dtype


def _pair(graph: Graph, q: Any) -> Iterator[tuple[str, str]]:
    """Whether a DequantizeLinear of the same scale is directly behind a QuantizeLinear."""
    readers = graph.readers(q.output[0])
    if not readers:
        yield "C", "nothing dequantizes what it makes"
    for reader in readers:
        if reader.op_type != "DequantizeLinear":
            yield "C", f"{reader.op_type} stands between it and its DequantizeLinear"
            continue
        there, back = (graph.constant(node.input[1]) for node in (q, reader))
        if there is not None and back is not None and not np.array_equal(there, back):
            yield "A", "its DequantizeLinear has another scale"


def _layer(graph: Graph, node: Any) -> Iterator[tuple[str, str]]:
    """Whether input and weight of a layer are quantized as the documentation asks, or both float.

    A MatMul of two activations has no weight and may stay float.
    """
    dq = graph.producer(node.input[1])
    moved = dq is not None and dq.op_type == "Transpose"
    if moved:
        dq = graph.producer(dq.input[0])
    weight = graph.constant(dq.input[0]) if dq is not None and _is(dq) else None
    if weight is None:
        direct = graph.constant(node.input[1])
        if direct is not None and direct.dtype.kind in "iu":
            yield "C", "its integer weight is not dequantized in front of it"
        return
    if moved:
        yield "D", "a Transpose stands between its weight and the layer: store it transposed"
        return
    if not _is(graph.producer(node.input[0])):
        yield "D", "its weight is quantized and its input is not"
    if node.op_type.startswith("Conv") and weight.ndim not in (4, 5):
        yield "E", "TensorRT reads convolutions in 2 and 3 dimensions only"
    scale = graph.constant(dq.input[1])
    axis = graph.attribute(dq, "axis", 1) % max(weight.ndim, 1)
    wanted = _output_axis(graph, node, weight.ndim)
    if scale is not None and scale.size == 1 and weight.shape[wanted] > 1:
        yield "D", "its weight has one scale: give it one per output channel"
    elif scale is not None and scale.size > 1 and axis != wanted:
        yield "D", f"its weight's scales run along axis {axis}, output channels along {wanted}"
    if len(node.input) > 2 and node.input[2] and _is(graph.producer(node.input[2])):
        yield "C", "its bias is quantized: TensorRT reads it in float"


def _output_axis(graph: Graph, node: Any, rank: int) -> int:
    """The dimension of a layer's weight that runs over its output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if graph.attribute(node, "transB", 0) else 1
    return rank - 1


def _sum(graph: Graph, node: Any) -> Iterator[tuple[str, str]]:
    """Whether the sum of a quantized layer's output and something else reads that in int8."""
    if any(graph.constant(name) is not None for name in node.input):
        return  # a bias
    made = [graph.producer(name) for name in node.input]
    for number, one in enumerate(made):
        other = made[1 - number]
        if _quantized_layer(graph, one) and not _is(other) and not _quantized_layer(graph, other):
            yield "D", f"the residual input {node.input[1 - number]} is not quantized"


def _quantized_layer(graph: Graph, node: Any) -> bool:
    """Whether it is a layer, or the round trip of one's output, whose weight is int8."""
    if node is not None and _is(node):
        q = graph.producer(node.input[0])
        node = graph.producer(q.input[0]) if q is not None else None
    if node is not None and node.op_type == "Add" and graph.constant(node.input[1]) is not None:
        node = graph.producer(node.input[0])  # the bias of a MatMul
    return node is not None and node.op_type in _LAYERS and _is(graph.producer(node.input[1]))


def _is(node: Any) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"
