"""Reads, edits and writes ncnn's two files: .param (text, the graph) and .bin (the weights).

The format and the integer arithmetic are those of ncnn's own sources: ``modelbin.cpp`` (tags),
``convolution.cpp``, ``convolutiondepthwise.cpp`` and ``innerproduct.cpp`` (parameters, order of
the weights), ``net.cpp`` (feature mask).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from slimkit.errors import ExportError

MAGIC = "7767517"
FLOAT_TAG = b"\0\0\0\0"
INT8_TAG = (0x000D4B38).to_bytes(4, "little")
NO_WINOGRAD = "64"  # bit 6 of a layer's feature mask, parameter 31


@dataclass(frozen=True)
class LayerLine:
    """One line of a .param file: type, name, input and output blobs, parameters by number."""

    type: str
    name: str
    inputs: list[str]
    outputs: list[str]
    params: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = f"{len(self.inputs)} {len(self.outputs)}"
        params = [f"{k}={v}" for k, v in self.params.items()]
        return " ".join([self.type, self.name, counts, *self.inputs, *self.outputs, *params])

    @property
    def int8(self) -> bool:
        """Whether the layer computes on integers."""
        return self.type in INT8_LAYERS and self.params.get("8", "0") != "0"


INT8_LAYERS = frozenset({"Convolution", "ConvolutionDepthWise", "InnerProduct"})


@dataclass(frozen=True)
class Rounding:
    """One operation of the program that computes on integers.

    Args:
        marker: name of the marker layer that pnnx left in front of the operation.
        place: the operation's name in the program, for messages.
        placeholder: float32, random and unique: what pnnx was given in place of the weight.
        weight: int8, shape (out, in / groups, kh, kw) or (out, in).
        weight_scale: float32, shape (out,).
        input_scale: size of one step of the rounded input.
        bias: float32, shape (out,), or None.
    """

    marker: str
    place: str
    placeholder: np.ndarray
    weight: np.ndarray
    weight_scale: np.ndarray
    input_scale: float
    bias: np.ndarray | None


def read_param(text: str) -> list[LayerLine]:
    """The layers of a .param file in order of execution."""
    lines = text.split("\n")
    if lines[0].strip() != MAGIC:
        raise ExportError("this is not an ncnn .param file: its first line must be 7767517")
    layers = []
    for line in lines[2:]:
        if not line.strip():
            continue
        kind, name, n_in, n_out, *rest = line.split()
        ins, outs = int(n_in), int(n_out)
        params = dict(item.split("=", 1) for item in rest[ins + outs :])
        layers.append(LayerLine(kind, name, rest[:ins], rest[ins : ins + outs], params))
    return layers


def write_param(layers: list[LayerLine]) -> str:
    """The text of a .param file."""
    blobs = sum(len(layer.outputs) for layer in layers)
    return "\n".join([MAGIC, f"{len(layers)} {blobs}", *map(str, layers), ""])


def to_int8(
    layers: list[LayerLine], weights: bytes, roundings: Iterable[Rounding]
) -> tuple[list[LayerLine], bytes]:
    """Drop every marker layer and turn the layer behind it into its integer form.

    Args:
        layers: what pnnx made of the program with markers and placeholder weights.
        weights: the .bin file of it, all float32.
        roundings: one for each marker.

    Returns:
        Layers and .bin bytes of a model that rounds, multiplies and accumulates integers there.
    """
    waiting = {rounding.marker: rounding for rounding in roundings}
    marked: dict[str, tuple[str, Rounding]] = {}  # blob behind a marker: blob before it, rounding
    new_layers: list[LayerLine] = []
    new_weights: list[bytes] = []
    done = 0  # bytes of `weights` that are dealt with
    for layer in layers:
        if layer.name in waiting:
            marked[layer.outputs[0]] = (layer.inputs[0], waiting.pop(layer.name))
        elif not marked.keys().isdisjoint(layer.inputs):
            source, rounding = marked[layer.inputs[0]]
            start, end = _find(weights, rounding, layer, done)
            new_weights.append(weights[done:start])
            done = end
            made, blocks = _integer_layers(replace(layer, inputs=[source]), rounding)
            new_layers += made
            new_weights.append(blocks)
        else:
            new_layers.append(layer)
    if waiting:
        places = ", ".join(rounding.place for rounding in waiting.values())
        raise ExportError(
            f"pnnx dropped the rounded inputs of {places}: keep those layers in float"
        )
    return new_layers, b"".join([*new_weights, weights[done:]])


def _find(weights: bytes, rounding: Rounding, layer: LayerLine, start: int) -> tuple[int, int]:
    """Where the float weight and bias of `layer` lie in the .bin file."""
    block = FLOAT_TAG + rounding.placeholder.astype("<f4").tobytes()
    at = weights.find(block, start)
    known = layer.type in (*INT8_LAYERS, "Gemm")
    if at < 0 or not known:
        raise ExportError(
            f"pnnx made a {layer.type} of {rounding.place}, which slimkit cannot turn into an "
            "integer layer: keep this layer in float"
        )
    end = at + len(block)
    if rounding.bias is not None:
        bias = rounding.bias.astype("<f4").tobytes()
        if layer.type == "Gemm" and weights.startswith(FLOAT_TAG + bias, end):
            bias = FLOAT_TAG + bias
        if not weights.startswith(bias, end):
            raise ExportError(
                f"pnnx changed the bias of {rounding.place}: keep this layer in float"
            )
        end += len(bias)
    return at, end


def _integer_layers(layer: LayerLine, rounding: Rounding) -> tuple[list[LayerLine], bytes]:
    """The integer form of one float layer and its weights."""
    out, size = rounding.weight.shape[0], rounding.weight.size
    if layer.type in ("InnerProduct", "Gemm"):
        params = {"0": str(out), "1": str(int(rounding.bias is not None)), "2": str(size), "8": "2"}
        fused = {k: v for k, v in layer.params.items() if k in ("9", "-23310")}
        if layer.type == "Gemm":
            fused = {}  # there 9 is a size
        made = replace(layer, type="InnerProduct", params=params | fused)
        return [made], _block(rounding, slice(0, out))
    groups = int(layer.params.get("7", "1"))
    if layer.type == "ConvolutionDepthWise" and groups == out and rounding.weight.shape[1] == 1:
        return [replace(layer, params=layer.params | {"8": "1"})], _block(rounding, slice(0, out))
    return _convolutions(layer, rounding, groups)


def _convolutions(
    layer: LayerLine, rounding: Rounding, groups: int
) -> tuple[list[LayerLine], bytes]:
    """One integer convolution a group, as ncnn's grouped one has a single weight scale a group."""
    out, inner = rounding.weight.shape[0] // groups, rounding.weight.shape[1]
    params = {k: v for k, v in layer.params.items() if k != "7"}
    params |= {"0": str(out), "6": str(rounding.weight.size // groups), "8": "2"}
    made, blocks = [], b""
    for g in range(groups):
        rows = slice(g * out, (g + 1) * out)
        safe = winograd_is_exact(rounding.weight[rows])
        mask = {} if safe or not _may_use_winograd(params) else {"31": NO_WINOGRAD}
        suffix = "" if groups == 1 else f"_g{g}"
        ins = layer.inputs if groups == 1 else [f"{layer.name}_in{suffix}"]
        outs = layer.outputs if groups == 1 else [f"{layer.name}_out{suffix}"]
        name = layer.name + suffix
        made.append(LayerLine("Convolution", name, ins, outs, params | mask))
        blocks += _block(rounding, rows)
    if groups > 1:
        sizes = ",".join([str(groups), *[str(inner)] * groups])
        parts = [conv.inputs[0] for conv in made]
        split = LayerLine("Slice", f"{layer.name}_slice", layer.inputs, parts, {"-23300": sizes})
        parts = [conv.outputs[0] for conv in made]
        joined = LayerLine("Concat", f"{layer.name}_concat", parts, layer.outputs, {"0": "0"})
        made = [split, *made, joined]
    return made, blocks


def _may_use_winograd(params: dict[str, str]) -> bool:
    ones = ("2", "12", "3", "13")  # dilations and strides; height defaults to width
    square = params.get("1") == "3" and params.get("11", "3") == "3"
    return square and all(params.get(key, "1") == "1" for key in ones)


def winograd_is_exact(weight: np.ndarray) -> bool:
    """Whether ncnn's int8 winograd F(4, 3) gives the exact integer sums for every int8 input.

    It computes 576 times each sum in wrapping int32 and divides at the end (``/ 576`` in
    ``convolution_3x3_winograd_int8.h``), so the sum must stay below 2**31 / 576.
    """
    rows = np.abs(weight.astype(np.int64)).reshape(weight.shape[0], -1)
    return int(rows.sum(1).max()) * 127 * 576 < 2**31


def _block(rounding: Rounding, rows: slice) -> bytes:
    """Weight, bias, weight scales and input scale of some output channels, as ncnn reads them."""
    raw = np.ascontiguousarray(rounding.weight[rows], dtype=np.int8).tobytes()
    block = INT8_TAG + raw + b"\0" * (-len(raw) % 4)
    if rounding.bias is not None:
        block += rounding.bias[rows].astype("<f4").tobytes()
    # ncnn multiplies by its scales where slimkit divides
    block += (1.0 / rounding.weight_scale[rows].astype(np.float64)).astype("<f4").tobytes()
    return block + np.array(1.0 / rounding.input_scale, dtype="<f4").tobytes()
