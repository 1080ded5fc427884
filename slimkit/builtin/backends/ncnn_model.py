"""Reads, edits and writes ncnn's two files: .param (text, the graph) and .bin (the weights).

The format and the integer arithmetic are those of ncnn's own sources: ``modelbin.cpp`` (tags),
``convolution.cpp``, ``convolutiondepthwise.cpp`` and ``innerproduct.cpp`` (parameters, order of
the weights), ``net.cpp`` (feature mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from slimkit.errors import ExportError

MAGIC = "7767517"
FLOAT_TAG = b"\0\0\0\0"
INT8_TAG = (0x000D4B38).to_bytes(4, "little")
# Bit 6 of a layer's feature mask (parameter 31). ncnn's int8 winograd F(4, 3) computes 576 times
# each sum in 32 bits (convolution_3x3_winograd_int8.h), which overflows from sums of 2**31 / 576
# on; so ncnn's own tool leaves such weights 6 bits. Without it 8 bits are exact, and as fast.
NO_WINOGRAD = "64"


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

# what pnnx may put between a marker and its readers; rounding behind it is the same
MOVES = frozenset({"Split", "Reshape", "Flatten", "Squeeze", "ExpandDims", "Permute", "Noop"})


@dataclass(frozen=True)
class Rounding:
    """One operation of the program that computes on integers.

    Args:
        place: the operation's name in the program, for messages.
        placeholder: float32, random and unique: what pnnx was given in place of the weight, so
            that it can be found in the .bin file.
        weight: int8, shape (out, in / groups, kh, kw) or (out, in).
        weight_scale: float32, shape (out,).
        input_scale: size of one step of the rounded input.
        bias: float32, shape (out,), or None.
    """

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
    layers: list[LayerLine], weights: bytes, roundings: Sequence[Rounding], marker: str
) -> tuple[list[LayerLine], bytes]:
    """Drop the marker layers and turn the layers behind them into their integer form.

    Args:
        layers: what pnnx made of the program with markers and placeholder weights.
        weights: the .bin file of it, all float32, in the order of the layers.
        roundings: the operations that read a marker.
        marker: type of the marker layers.

    Returns:
        Layers and .bin bytes of a model that rounds, multiplies and accumulates integers there.
    """
    found = sorted(((_find(weights, r), r) for r in roundings), key=lambda pair: pair[0])
    waiting = iter(found)
    marked: dict[str, str] = {}  # blob behind a marker: the blob to read instead
    new_layers: list[LayerLine] = []
    new_weights: list[bytes] = []
    done = count = 0  # bytes of `weights` and roundings that are dealt with
    for layer in layers:
        if layer.type == marker:
            marked[layer.outputs[0]] = layer.inputs[0]
            continue
        direct = replace(layer, inputs=[marked.get(blob, blob) for blob in layer.inputs])
        rounded = bool(layer.inputs) and layer.inputs[0] in marked
        if rounded and layer.type in MOVES:
            marked.update({blob: blob for blob in layer.outputs})
        if not rounded or layer.type in MOVES:
            new_layers.append(direct)
            continue
        (start, end), rounding = next(waiting, ((0, 0), None))
        if rounding is None or _weight_size(layer) != rounding.weight.size:
            place = "an operation" if rounding is None else rounding.place
            raise ExportError(
                f"pnnx made a {layer.type} of {place}, which slimkit cannot turn into an integer "
                "layer: keep this layer in float"
            )
        made, block = _integer_layers(direct, rounding)
        new_layers += made
        new_weights += [weights[done:start], block]
        done, count = end, count + 1
    if count < len(found):
        places = ", ".join(rounding.place for _, rounding in found[count:])
        raise ExportError(f"pnnx dropped the rounded inputs of {places}: keep them in float")
    return new_layers, b"".join([*new_weights, weights[done:]])


def _weight_size(layer: LayerLine) -> int:
    """How many weights a layer says that it has; 0 for one that has no integer form."""
    if layer.type == "Gemm":
        return int(layer.params.get("8", "0")) * int(layer.params.get("9", "0"))
    key = {"Convolution": "6", "ConvolutionDepthWise": "6", "InnerProduct": "2"}.get(layer.type)
    return int(layer.params.get(key, "0")) if key else 0


def _find(weights: bytes, rounding: Rounding) -> tuple[int, int]:
    """Where placeholder and bias of an operation lie in the .bin file."""
    block = FLOAT_TAG + rounding.placeholder.astype("<f4").tobytes()
    start = weights.find(block)
    end = start + len(block)
    if start < 0:
        raise ExportError(f"pnnx changed the weight of {rounding.place}: keep this layer in float")
    if rounding.bias is None:
        return start, end
    bias = rounding.bias.astype("<f4").tobytes()
    for form in (bias, FLOAT_TAG + bias):  # convolutions and InnerProduct; Gemm
        if weights.startswith(form, end):
            return start, end + len(form)
    raise ExportError(f"pnnx changed the bias of {rounding.place}: keep this layer in float")


def _integer_layers(layer: LayerLine, rounding: Rounding) -> tuple[list[LayerLine], bytes]:
    """The integer form of one float layer and its weights."""
    out, size = rounding.weight.shape[0], rounding.weight.size
    if layer.type in ("InnerProduct", "Gemm"):
        params = {"0": str(out), "1": str(int(rounding.bias is not None)), "2": str(size), "8": "2"}
        if layer.type == "InnerProduct":
            params |= {k: v for k, v in layer.params.items() if k in ("9", "-23310")}  # activation
        made = replace(layer, type="InnerProduct", params=params)
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
    params |= {"0": str(out), "6": str(rounding.weight.size // groups), "8": "2", "31": NO_WINOGRAD}
    made, blocks = [], b""
    for g in range(groups):
        rows = slice(g * out, (g + 1) * out)
        suffix = "" if groups == 1 else f"_g{g}"
        ins = layer.inputs if groups == 1 else [f"{layer.name}_in{suffix}"]
        outs = layer.outputs if groups == 1 else [f"{layer.name}_out{suffix}"]
        name = layer.name + suffix
        made.append(LayerLine("Convolution", name, ins, outs, params))
        blocks += _block(rounding, rows)
    if groups > 1:
        sizes = ",".join([str(groups), *[str(inner)] * groups])
        parts = [conv.inputs[0] for conv in made]
        split = LayerLine("Slice", f"{layer.name}_slice", layer.inputs, parts, {"-23300": sizes})
        parts = [conv.outputs[0] for conv in made]
        joined = LayerLine("Concat", f"{layer.name}_concat", parts, layer.outputs, {"0": "0"})
        made = [split, *made, joined]
    return made, blocks


def _block(rounding: Rounding, rows: slice) -> bytes:
    """Weight, bias, weight scales and input scale of some output channels, as ncnn reads them."""
    raw = np.ascontiguousarray(rounding.weight[rows], dtype=np.int8).tobytes()
    block = INT8_TAG + raw + b"\0" * (-len(raw) % 4)
    if rounding.bias is not None:
        block += rounding.bias[rows].astype("<f4").tobytes()
    # ncnn multiplies by its scales where slimkit divides
    block += (1.0 / rounding.weight_scale[rows].astype(np.float64)).astype("<f4").tobytes()
    return block + np.array(1.0 / rounding.input_scale, dtype="<f4").tobytes()
