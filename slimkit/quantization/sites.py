"""Decides which tensors of a model are rounded, so that a backend can compute on integers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slimkit.calls import WEIGHTED, Call, Trace
from slimkit.errors import QuantizationError, did_you_mean
from slimkit.interfaces import Scheme

STEPS = {"silu": "sigmoid"}
"""Operations that are their input times a function of it: that function, rounded in between."""

TAIL = frozenset(
    {"cat", "stack", "sigmoid", "softmax", "log_softmax", "tanh", "exp", "add", "sub", "mul", "div"}
    | {"flatten", "reshape", "view", "permute", "transpose", "t", "squeeze", "unsqueeze", "mT", "T"}
    | {"contiguous", "clone", "chunk", "split", "getitem", "unbind", "movedim", "swapaxes"}
    | {"detach", "unflatten", "clamp", "select", "narrow"}
)
"""Operations that stay in float between the last layers and the model's outputs.

There they put quantities of different size side by side (a detector's boxes and scores), which one
scale cannot serve, and no layer behind them would read integers.
"""

PAIRWISE = ("add", "mul", "sub", "div", "matmul")
"""Operations that compute on integers only if both arguments are tensors made by the model."""


_INPUT = "input"  # and a number: what rounds an input of the model


@dataclass(frozen=True)
class Sites:
    """Where the fake-quantizers of one model sit.

    Calls are named as `slimkit.calls.CallMode` names them.

    Args:
        inputs: call -> n -> quantizer, for the n-th tensor that the call reads.
        outputs: call -> quantizer, for all tensors that the call makes.
        weights: call -> (quantizer, path of the parameter).
        skipped: call -> why it stays in float although the backend could.
        inner: call -> quantizer, for what an operation of `STEPS` multiplies its input with.
    """

    inputs: dict[str, dict[int, str]] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    weights: dict[str, tuple[str, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    inner: dict[str, str] = field(default_factory=dict)

    @property
    def activations(self) -> list[str]:
        """The activation quantizers, each once."""
        read = [quantizer for reads in self.inputs.values() for quantizer in reads.values()]
        return list(dict.fromkeys([*read, *self.inner.values(), *self.outputs.values()]))

    def source(self, call: Call, trace: Trace, position: int = 0) -> str | None:
        """The quantizer that rounds the first tensor that `call` reads, or another of them."""
        if position in self.inputs.get(call.name, {}):
            return self.inputs[call.name][position]
        for made in trace.calls:
            if position < len(call.inputs) and call.inputs[position] in made.outputs:
                return self.outputs.get(made.name)
        return None


def find_sites(
    trace: Trace,
    scheme: Scheme,
    keep_float: Sequence[str] = (),
    apart: Mapping[str, str] | None = None,
) -> Sites:
    """Place the quantizers that `scheme` asks for on the calls of `trace`.

    Args:
        trace: one forward of the model.
        scheme: the backend's arithmetic.
        keep_float: patterns of modules, with all that is in them, or of call names that stay in
            float.
        apart: calls that stay in float, and why.

    Raises:
        QuantizationError: a pattern is of nothing that is called.
    """
    for pattern in keep_float:
        if not any(_is_called(call, pattern) for call in trace.calls):
            near = did_you_mean(pattern, {_path(call) for call in trace.calls})
            raise QuantizationError(
                f"keep_float: no layer of the model is called {pattern!r}{near}"
            )
    skipped: dict[str, str] = {}
    integer: dict[str, Call] = {}
    tail = tail_of(trace) if scheme.placement == "tensors" else set()
    for call in trace.calls:
        if call.op not in scheme.operations | scheme.steps:
            continue
        reason = _obstacle(call, keep_float) or (apart or {}).get(call.name, "")
        if not reason and not scheme.depthwise and _is_depthwise(call):
            reason = "the backend computes depthwise convolutions in float"
        if not reason and call.name in tail:
            reason = "no layer behind it reads integers"
        if reason:
            skipped[call.name] = reason
        else:
            integer[call.name] = call
    if scheme.placement == "inputs":
        inputs = {
            name: {
                n: f"{name}:in{n}" for n in range(1 if call.op in WEIGHTED else len(call.inputs))
            }
            for name, call in integer.items()
        }
        return Sites(inputs, {}, _weights(integer), skipped)
    return _on_tensors(trace, scheme, integer, skipped)


def is_input(quantizer: str) -> bool:
    """Whether a quantizer of placement ``tensors`` rounds an input of the model."""
    return quantizer.startswith(_INPUT) and ":" not in quantizer  # calls have a colon


def prescribed(quantizer: str, scheme: Scheme) -> tuple[float, int] | None:
    """Scale and zero point of an activation quantizer that has no choice."""
    *_, op, _, place = ("", "", *quantizer.split(":"))  # such as act:sigmoid:0:out
    op = STEPS.get(op, op) if place == "inner" else op
    grids = {name: (scale, zero_point) for name, scale, zero_point in scheme.prescribed}
    return grids.get(op) if place in ("out", "inner") else None


def tail_of(trace: Trace) -> set[str]:
    """The calls of `TAIL` from which only such calls lead on, to the model's outputs."""
    readers = trace.readers()
    found: set[str] = set()
    for call in reversed(trace.calls):
        behind = [reader for number in call.outputs for reader in readers.get(number, [])]
        leads_out = bool(behind) or bool(set(call.outputs) & trace.outputs)
        if call.op in TAIL and leads_out and all(reader.name in found for reader in behind):
            found.add(call.name)
    return found


def _obstacle(call: Call, keep_float: Sequence[str]) -> str:
    """Why a call cannot compute on integers; empty if it can."""
    for pattern in keep_float:
        if _is_called(call, pattern):
            return f"kept in float by {pattern!r}"
    if call.op in WEIGHTED:
        if call.weight_path is None:
            return (
                "its weight is computed, not a parameter (of weight_norm, spectral_norm and "
                "parametrizations, rewrite: [plain-weights] makes it one)"
            )
        if len(call.inputs) != 1:
            return "its input is a parameter"
    elif call.op in PAIRWISE and len(set(call.inputs)) < 2:
        return "one argument is a constant or both are the same tensor"
    elif not call.inputs:
        return "it reads no tensor of the model"
    return ""


def _path(call: Call) -> str:
    """The module whose forward makes the call."""
    return call.name.split(":")[0].replace("/", ".")


def _is_called(call: Call, pattern: str) -> bool:
    """Whether the call, its module, or one around that is called like this."""
    names = (_path(call), call.name)
    return any(fnmatch.fnmatch(name, pattern) for name in names) or fnmatch.fnmatch(
        _path(call), f"{pattern}.*"
    )


def _is_depthwise(call: Call) -> bool:
    """Whether a convolution has as many groups as it makes channels, and more than one."""
    groups = call.arguments.get("groups", call.arguments.get(6, 1))
    return call.op.startswith("conv") and groups > 1 and groups == call.shape[1]


def _keeps(call: Call, scheme: Scheme) -> bool:
    """Whether a call passes integers on unchanged: moving values does, mixing them does not."""
    if call.op == "interpolate":
        mode = call.arguments.get("mode", call.arguments.get(3, "nearest"))
        return "interpolate" in scheme.keeps and mode in ("nearest", "nearest-exact")
    return call.op in scheme.keeps


def _weights(integer: dict[str, Call]) -> dict[str, tuple[str, str]]:
    found = {}
    for name, call in integer.items():
        if call.op in WEIGHTED:
            path = call.weight_path or ""
            found[name] = (f"{path.replace('.', '/')}:weight", path)
    return found


def _on_tensors(
    trace: Trace, scheme: Scheme, integer: dict[str, Call], skipped: dict[str, str]
) -> Sites:
    """One quantizer per tensor, where the tensor is made; later readers share it."""
    readers = trace.readers()
    wanted: set[int] = set()  # tensors that somebody reads as integers
    for call in reversed(trace.calls):
        if call.name in integer:
            wanted.update(call.inputs[:1] if call.op in WEIGHTED else call.inputs)
        elif _keeps(call, scheme) and wanted & set(call.outputs):
            wanted.update(call.inputs)

    def fused(call: Call) -> Call | None:
        """The one call behind `call` that the runtime merges into it."""
        number = call.outputs[0]
        behind = readers.get(number, [])
        if len(call.outputs) != 1 or len(behind) != 1 or number in trace.outputs:
            return None
        return behind[0] if behind[0].op in scheme.fuses else None

    inputs: dict[str, dict[int, str]] = {}
    outputs: dict[str, str] = {}
    rounded: dict[int, str] = {}  # tensor -> the quantizer whose grid it is on
    for n, number in enumerate(trace.inputs):
        if number not in wanted:
            continue
        rounded[number] = f"{_INPUT}{n}"
        for reader in readers.get(number, []):
            for position, read in enumerate(reader.inputs):
                if read == number and (reader.name in integer or _keeps(reader, scheme)):
                    inputs.setdefault(reader.name, {})[position] = f"{_INPUT}{n}"
    merged: set[str] = set()
    for call in trace.calls:
        if call.name in merged:
            continue
        end = call
        if call.name in integer:
            while (behind := fused(end)) is not None:
                end = behind
                merged.add(end.name)
        made = set(end.outputs)
        leaves = made & trace.outputs
        stays_float = scheme.float_outputs or (leaves and not scheme.rounds_outputs)
        if _keeps(end, scheme) and end.inputs and end.inputs[0] in rounded:
            if made & wanted:
                outputs[end.name] = rounded[end.inputs[0]]
                rounded.update(dict.fromkeys(made, rounded[end.inputs[0]]))
        elif made & wanted or (call.name in integer and not stays_float):
            outputs[end.name] = f"{end.name}:out"
            rounded.update(dict.fromkeys(made, outputs[end.name]))
    inner = {name: f"{name}:inner" for name, call in integer.items() if call.op in scheme.steps}
    return Sites(inputs, outputs, _weights(integer), skipped, inner)
