"""Rewrites of a quantized ONNX graph after which ONNX Runtime keeps every integer an integer.

A quantized tensor is written in ONNX as QuantizeLinear, DequantizeLinear. ONNX Runtime replaces
DequantizeLinear, operator, QuantizeLinear by an integer operator where it knows one. Each function
here removes one reason for which it would not, and changes no result.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from slimkit.onnx_export import add_constant, array_of

# operators that only move elements of their first input, and that ONNX Runtime runs on uint8
MOVES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split"}
    | {"Gather", "Resize", "Pad", "Expand", "Identity"}
)

_SOFTMAX_LIMIT, _SOFTMAX_LIMIT_EACH = 511, 140
"""The largest inverse of its output's scale, at all and for each value of a row."""


def keep_integers_(model: ir.Model) -> None:
    """Apply all rewrites of this file to `model`, then drop what is no longer used."""
    graph = model.graph
    clip_on_integers_(graph)
    pool_globally_(graph)
    move_integers_(graph)
    pad_inside_convolutions_(graph)
    softmax_in_float_(graph)
    keep_floats_(graph)
    common.RemoveUnusedNodesPass()(model)


def clip_on_integers_(graph: ir.Graph) -> None:
    """Turn ``x -> Relu or Clip -> Q`` into ``x -> Q -> Clip of the integers``, or leave out Clip.

    Rounding is monotone, so both give the same integers, and the operator in front of the
    activation is then directly in front of Q. ONNX Runtime itself only drops an activation whose
    bounds are exactly the ends of the integer range. Where x was just dequantized from another
    grid nothing is moved: ONNX Runtime would merge the two roundings into one.
    """
    for q in list(graph):
        value = q.inputs[0] if q.op_type == "QuantizeLinear" else None
        activation = value.producer() if value is not None else None
        if activation is None or activation.op_type not in ("Relu", "Clip") or not _per_tensor(q):
            continue
        bounds, dq = _bounds(activation), _dequantize(activation.inputs[0])
        if bounds is None or (dq is not None and not _same_grid(q, dq)):
            continue
        q.replace_input_with(0, activation.inputs[0])
        low, high = (_rounded(q, bound) for bound in bounds)
        limits = np.iinfo(low.dtype)
        if low > limits.min or high < limits.max:
            old = q.outputs[0]
            clip = _insert_after(
                graph, q, "Clip", [old, add_constant(graph, low), add_constant(graph, high)]
            )
            _replace_uses(old, clip.outputs[0], but=clip)


def pool_globally_(graph: ir.Graph) -> None:
    """Turn ``DQ -> ReduceMean over all pixels -> Q`` into GlobalAveragePool, which has integers."""
    for mean in list(graph):
        if mean.op_type != "ReduceMean" or len(mean.inputs) < 2:
            continue
        x, axes = mean.inputs[0], array_of(mean.inputs[1])
        if x is None or axes is None or x.shape is None or _dequantize(x) is None:
            continue
        rank = len(x.shape)
        users = [use.node for use in mean.outputs[0].uses()]
        if rank < 3 or sorted(int(a) % rank for a in axes) != list(range(2, rank)):
            continue
        if not users or any(u.op_type != "QuantizeLinear" for u in users):
            continue
        pool = _insert_after(graph, mean, "GlobalAveragePool", [x])
        for q in users:
            q.replace_input_with(0, pool.outputs[0])
            if mean.attributes.get_int("keepdims", 1) == 0:
                old = q.outputs[0]
                axes_const = add_constant(graph, np.arange(2, rank, dtype=np.int64))
                squeeze = _insert_after(graph, q, "Squeeze", [old, axes_const])
                _replace_uses(old, squeeze.outputs[0], but=squeeze)


def move_integers_(graph: ir.Graph) -> None:
    """Turn ``DQ -> move`` into ``move of the integers -> DQ``; then drop Q behind an equal DQ."""
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            dq = _dequantize(node.inputs[0])
            if dq is not None and _same_grid(node, dq) and dq.inputs[0] is not None:
                _replace_uses(node.outputs[0], dq.inputs[0])
            continue
        dq = _dequantize(node.inputs[0]) if node.inputs else None
        if dq is None or not _moves_only(graph, node, dq):
            continue
        node.replace_input_with(0, dq.inputs[0])
        after = node
        for out in node.outputs:
            new = _insert_after(graph, after, "DequantizeLinear", [out, *dq.inputs[1:]])
            new.outputs[0].shape, new.outputs[0].type = out.shape, out.type
            out.type = ir.TensorType(_dtype(dq))
            _replace_uses(out, new.outputs[0], but=new)
            after = new


def pad_inside_convolutions_(graph: ir.Graph) -> None:
    """Turn ``Pad with zeros -> DQ -> Conv`` into ``DQ -> Conv`` that pads by itself.

    ONNX Runtime does so in float, and with integers computes each Pad apart.
    """
    for conv in list(graph):
        dq = _dequantize(conv.inputs[0]) if conv.op_type == "Conv" and not conv.domain else None
        value = dq.inputs[0] if dq is not None else None
        pad = value.producer() if value is not None else None
        if dq is None or pad is None or pad.op_type != "Pad" or len(dq.outputs[0].uses()) != 1:
            continue
        if len(pad.inputs) != 3:  # without axes; `move_integers_` has written the fill down
            continue
        amounts, fill = array_of(pad.inputs[1]), array_of(pad.inputs[2])
        if pad.attributes.get_string("mode", "constant") != "constant":
            continue
        if conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or amounts is None:
            continue
        begin, end = np.split(amounts, 2)  # of each dimension, samples and channels first
        if (amounts < 0).any() or begin[:2].any() or end[:2].any() or fill != _zero(dq):
            continue
        pads = np.concatenate([begin[2:], end[2:]])
        pads = pads + np.array(conv.attributes.get_ints("pads", [0] * len(pads)))
        conv.attributes["pads"] = ir.AttrInt64s("pads", pads.tolist())
        dq.replace_input_with(0, pad.inputs[0])


def softmax_in_float_(graph: ir.Graph) -> None:
    """Turn ``DQ -> Softmax -> Q`` into ``DQ -> LogSoftmax -> Exp -> Q`` where steps are fine.

    ONNX Runtime makes QLinearSoftmax of the former, which multiplies a table's entry by the inverse
    of Q's scale in 32 bits (qlinear_softmax.cc). Where that overflows, the answer is noise: from
    512 on with a table of 23 bits; and from 148.4 times a row's values on, as 1.31 was measured,
    whose entries are smaller the longer a row is. A row of two (a gate) overflows from 297 on,
    where no probability comes near one.
    """
    for softmax in list(graph):
        if softmax.op_type != "Softmax" or softmax.domain or _dequantize(softmax.inputs[0]) is None:
            continue
        scales = [
            array_of(use.node.inputs[1])
            for use in softmax.outputs[0].uses()
            if use.node.op_type == "QuantizeLinear"
        ]
        limit = min(_SOFTMAX_LIMIT, _SOFTMAX_LIMIT_EACH * _row_of(softmax))
        if all(scale is None or (scale * limit > 1).all() for scale in scales):
            continue
        log = ir.Node("", "LogSoftmax", softmax.inputs, softmax.attributes.values(), num_outputs=1)
        graph.insert_before(softmax, log)
        exp = _insert_after(graph, log, "Exp", [log.outputs[0]])
        exp.outputs[0].shape, exp.outputs[0].type = (
            softmax.outputs[0].shape,
            softmax.outputs[0].type,
        )
        _replace_uses(softmax.outputs[0], exp.outputs[0])


def _row_of(softmax: ir.Node) -> int:
    """How many values are one distribution; at least two where the file does not tell."""
    shape, axis = softmax.inputs[0].shape, softmax.attributes.get_int("axis", -1)
    size = None if shape is None else shape[axis]
    return size if isinstance(size, int) else 2


def keep_floats_(graph: ir.Graph) -> None:
    """Give layers with float weights between integers a bias that ONNX Runtime cannot round.

    Its WeightBiasQuantization rounds such weights to int8 with one scale for all channels, though
    they were kept in float, unless the bias is no constant (weight_bias_quantization.cc). Here the
    bias comes out of DequantizeLinear, which is not folded away: +-2**23 times |bias| / 2**23,
    the same float to the last bit.
    """
    for node in list(graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.domain:
            continue
        weight = array_of(node.inputs[1])
        if _dequantize(node.inputs[0]) is None or weight is None or weight.dtype != np.float32:
            continue
        given = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
        if len(node.inputs) > 2 and node.inputs[2] is not None and given is None:
            continue
        bias = np.zeros(_outputs(node, weight), np.float32) if given is None else given.reshape(-1)
        integers = (np.sign(bias) * 2**23).astype(np.int32)
        scale = np.where(bias == 0, np.float32(1), np.abs(bias) / np.float32(2**23))
        dq = ir.Node(
            "",
            "DequantizeLinear",
            [add_constant(graph, integers), add_constant(graph, scale.astype(np.float32))],
            [ir.AttrInt64("axis", 0)],
            num_outputs=1,
        )
        graph.insert_before(node, dq)
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, dq.outputs[0])


def _outputs(node: ir.Node, weight: np.ndarray) -> int:
    """How many output channels a layer has."""
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1]) * node.attributes.get_int("group", 1)
    transposed = node.op_type == "Conv" or node.attributes.get_int("transB", 0)
    return int(weight.shape[0 if transposed else 1])


def _moves_only(graph: ir.Graph, node: ir.Node, dq: ir.Node) -> bool:
    if node.op_type not in MOVES or node.domain:
        return False
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") == "nearest"
    if node.op_type == "Pad":
        if node.attributes.get_string("mode", "constant") != "constant":
            return True
        given = node.inputs[2] if len(node.inputs) > 2 else None
        fill = np.float32(0) if given is None else array_of(given)
        if fill is None or not _on_grid(dq, float(fill)):
            return False
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, add_constant(graph, _rounded(dq, float(fill))))
    return True


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a Relu or Clip, or None where they are not constant."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    ends = [float("-inf"), float("inf")]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            array = array_of(value)
            if array is None:
                return None
            ends[i] = float(array)
    return ends[0], ends[1]


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes `value`, if it has one constant scale and zero point."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return node if _per_tensor(node) else None


def _per_tensor(node: ir.Node) -> bool:
    scale, zero = array_of(node.inputs[1]), _zero(node)
    return scale is not None and zero is not None and scale.size == 1


def _same_grid(a: ir.Node, b: ir.Node) -> bool:
    sa, sb, za, zb = array_of(a.inputs[1]), array_of(b.inputs[1]), _zero(a), _zero(b)
    if sa is None or sb is None or za is None or zb is None or sa.size != 1:
        return False
    return bool(sa == sb and za == zb and za.dtype == zb.dtype)


def _zero(node: ir.Node) -> np.ndarray | None:
    return array_of(node.inputs[2]) if len(node.inputs) > 2 else None


def _rounded(node: ir.Node, x: float) -> np.ndarray:
    """The integer that `x` becomes on the grid of a QuantizeLinear or DequantizeLinear."""
    scale, zero = array_of(node.inputs[1]), _zero(node)
    if scale is None or zero is None:
        raise AssertionError("callers check that the grid is constant")
    limits = np.iinfo(zero.dtype)
    q = np.rint(np.float32(x) / scale.astype(np.float32)) + zero.astype(np.float32)
    return np.clip(q, limits.min, limits.max).astype(zero.dtype)


def _on_grid(dq: ir.Node, x: float) -> bool:
    """Whether `x` is one of the numbers that a DequantizeLinear makes."""
    scale, zero = array_of(dq.inputs[1]), _zero(dq)
    if scale is None or zero is None:
        return False
    steps = _rounded(dq, x).astype(np.float32) - zero.astype(np.float32)
    return bool(steps * scale.astype(np.float32) == np.float32(x))


def _dtype(dq: ir.Node) -> ir.DataType:
    zero = _zero(dq)
    return ir.DataType.UINT8 if zero is None else ir.DataType.from_numpy(zero.dtype)


def _insert_after(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: list[ir.Value | None]
) -> ir.Node:
    new = ir.Node("", op_type, inputs, num_outputs=1)
    graph.insert_after(node, new)
    return new


def _replace_uses(old: ir.Value, new: ir.Value, but: ir.Node | None = None) -> None:
    """Let every reader of `old` read `new`; a graph output keeps its name."""
    for use in list(old.uses()):
        if use.node is not but:
            use.node.replace_input_with(use.idx, new)
    graph = old.graph
    for i, out in enumerate(graph.outputs if graph is not None else []):
        if out is old and graph is not None:
            old.name, new.name = new.name, old.name
            graph.outputs[i] = new
