"""From a program of slimkit to the ONNX file that TensorRT's rules ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from slimkit.interfaces import Deployable
from slimkit.onnx_export import add_constant, array_of, strip_, to_onnx

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def convert(deployable: Deployable, *, half: bool = False) -> Any:
    """An ``onnx.ModelProto`` that computes what the program does.

    Args:
        deployable: not changed.
        half: whether layers that stay in float compute in float16, between casts.

    Raises:
        ExportError: ONNX has no counterpart of an operation.
    """
    model = to_onnx(deployable, "tensorrt").model
    store_transposed_(model.graph)
    if half:
        layers_in_half_(model.graph)
    strip_(model)
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
    return ir.to_proto(model)


def store_transposed_(graph: ir.Graph) -> None:
    """Turn ``integer weight -> DQ -> Transpose -> layer`` into ``its transpose -> DQ -> layer``.

    TensorRT looks for the dequantization directly in front of a layer.
    """
    for transpose in list(graph):
        dq = transpose.inputs[0].producer() if transpose.op_type == "Transpose" else None
        weight = array_of(dq.inputs[0]) if dq is not None else None
        if dq is None or dq.op_type != "DequantizeLinear" or weight is None:
            continue
        order = transpose.attributes.get_ints("perm", list(reversed(range(weight.ndim))))
        axis = order.index(dq.attributes.get_int("axis", 1) % weight.ndim)
        stored = add_constant(graph, np.ascontiguousarray(weight.transpose(order)))
        new = ir.Node(
            "",
            "DequantizeLinear",
            [stored, *dq.inputs[1:]],
            [ir.AttrInt64("axis", axis)],
            num_outputs=1,
        )
        graph.insert_before(transpose, new)
        transpose.outputs[0].replace_all_uses_with(new.outputs[0])


def layers_in_half_(graph: ir.Graph) -> None:
    """Compute layers whose weight is float in float16, as a strongly typed network does.

    Integer layers stay as they are: what they read and give is float32 between the roundings.
    """
    for node in list(graph):
        if node.op_type not in _LAYERS or _dequantized(node.inputs[1]):
            continue
        if any(v is not None and _kind(v) not in (None, ir.DataType.FLOAT) for v in node.inputs):
            continue
        for number, value in enumerate(node.inputs):
            if value is None:
                continue
            array = array_of(value)
            if array is not None:
                half = add_constant(graph, array.astype(np.float16))
            else:
                cast = _cast(value, ir.DataType.FLOAT16)
                graph.insert_before(node, cast)
                half = cast.outputs[0]
            node.replace_input_with(number, half)
        out = node.outputs[0]
        out.type = ir.TensorType(ir.DataType.FLOAT16)
        back = _cast(out, ir.DataType.FLOAT)
        graph.insert_after(node, back)
        _replace_uses(graph, out, back)


def _replace_uses(graph: ir.Graph, old: ir.Value, by: ir.Node) -> None:
    """Let every reader of `old` but `by` read what `by` makes; an output keeps its name."""
    new = by.outputs[0]
    new.shape = old.shape
    for use in list(old.uses()):
        if use.node is not by:
            use.node.replace_input_with(use.idx, new)
    for number, value in enumerate(graph.outputs):
        if value is old:
            old.name, new.name = f"{old.name}_half", old.name
            graph.outputs[number] = new


def _dequantized(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _kind(value: ir.Value) -> ir.DataType | None:
    return None if value.type is None else value.type.dtype


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], num_outputs=1)
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), value.shape
    return node
