"""The finished model in the integer arithmetic of its backend, to compare files with.

A simulation in float differs from the device where a value lies on the edge between two integers:
float sums carry rounding errors, sums of integers carry none. One such step in a hundred thousand
values of an early layer is a few per cent of all values at the end of a deep, narrow network. Here
convolutions and linear layers sum integers and scale them as the backend's `Scheme.arithmetic`
says, which may hold for sums and products of branches as well; everything else computes in float
as in the simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.calls import Call, Trace
from slimkit.copies import copied
from slimkit.quantization.arithmetic import (
    ARITHMETICS,
    INTEGER_PAIRS,
    fixed_point_sum,
    float32,
    scaled_product,
)
from slimkit.quantization.fake import QuantizedModel
from slimkit.quantization.finished import Finished, FinishedMode
from slimkit.quantization.mode import INNER
from slimkit.quantization.sites import is_input

_EXACT = 2**24  # integers that float32 holds, so that their sums are exact in any order


def exact(model: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """A module that computes as the backend's file does.

    Args:
        model: what `quantize` returned; a float model, and a simulation whose backend's arithmetic
            is unknown, are given back as they are. Not changed.
        example_inputs: the forward's arguments, to trace the model with.
    """
    if not isinstance(model, QuantizedModel) or model.fake.scheme.arithmetic == "unknown":
        return model
    return _Exact(copied(model).cpu().eval(), example_inputs).eval()


@dataclass(frozen=True)
class _Layer:
    """What an integer layer needs beside its constants.

    Args:
        step: scale of the input.
        output: scale of what the layer's output is rounded to, or None where it stays float.
        wide: whether sums may leave the integers of float32.
    """

    step: float
    output: float | None
    wide: bool


@dataclass(frozen=True)
class _Pair:
    """What the sum or the product of two rounded tensors needs.

    Args:
        op: the operation.
        steps: scales of the two.
        output: scale of what the result is rounded to.
    """

    op: str
    steps: tuple[float, float]
    output: float

    def __call__(self, *both: Tensor) -> Tensor:
        """The result in float64, on its grid."""
        a, b = ((x.double() / s).round() for x, s in zip(both, self.steps, strict=True))
        if self.op in _SIGNS:
            made = fixed_point_sum(a, b, self.steps, self.output, _SIGNS[self.op])
        else:
            made = scaled_product(a, b, self.steps, self.output)
        return made * self.output


_SIGNS = {"add": 1, "iadd": 1, "radd": 1, "sub": -1, "isub": -1}
_PRODUCTS = frozenset({"mul", "imul", "rmul"})


class _Exact(nn.Module):
    """Runs a finished model's integer layers on integers."""

    def __init__(self, quantized: QuantizedModel, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.finished = Finished(quantized.model, quantized.fake, inputs)
        traced = self.finished.traced
        self.scheme = quantized.fake.scheme
        self.arithmetic = ARITHMETICS[self.scheme.arithmetic]
        self.layers: dict[str, _Layer] = {}
        calls = {call.name: call for call in traced.calls}
        for name, constants in self.finished.layers.items():
            source = self.finished.sites.source(calls[name], traced)
            if constants.scale is None or source is None:
                continue
            weight = getattr(self.finished, constants.weight).double()
            largest = weight.abs().flatten(1).sum(1).max() * (
                self.scheme.activations.qmax - self.scheme.activations.qmin
            )
            self.layers[name] = _Layer(
                self.finished.roundings[source].scale,
                self._output_scale(calls[name], traced),
                bool(largest >= _EXACT),
            )

        self.pairs: dict[str, _Pair] = {}
        if self.scheme.arithmetic in INTEGER_PAIRS:
            for call in traced.calls:
                self._add_pair(call, traced)

    def _add_pair(self, call: Call, traced: Trace) -> None:
        """Note a sum, a product or an operation in steps whose parts and result are rounded."""
        sites, roundings = self.finished.sites, self.finished.roundings
        sources = [sites.source(call, traced)]
        if call.name in sites.inner:
            sources.append(sites.inner[call.name])
        elif {call.op} & {*_SIGNS, *_PRODUCTS} and len(call.inputs) == 2:
            sources.append(sites.source(call, traced, 1))
        output = self._output_scale(call, traced)
        scales = [roundings[name].scale for name in sources if name is not None]
        if output is not None and len(scales) == 2 and "alpha" not in call.arguments:
            self.pairs[call.name] = _Pair(call.op, (scales[0], scales[1]), output)

    def _output_scale(self, call: Call, traced: Trace) -> float | None:
        """The scale of the rounding behind `call` and what the backend merges into it."""
        readers = traced.readers()
        while True:
            quantizer = self.finished.moved.get(call.name) or self.finished.sites.outputs.get(
                call.name
            )
            if quantizer is not None:
                return self.finished.roundings[quantizer].scale
            behind = readers.get(call.outputs[0], [])
            fused = self.finished.skipped | {c.name for c in behind if c.op in self.scheme.fuses}
            if len(behind) != 1 or behind[0].name not in fused:
                return None
            call = behind[0]

    def forward(self, *args: Any) -> Any:
        """The model's outputs, in float32."""
        with _ExactMode(self):
            return self.finished.network(*args)


class _ExactMode(FinishedMode):
    """Computes the layers of `_Exact` on integers."""

    def __init__(self, owner: _Exact) -> None:
        super().__init__(owner.finished)
        self.owner = owner

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if name in self.owner.pairs:
            return self._pair(name, op, args, kwargs)
        layer = self.owner.layers.get(name)
        if layer is None:
            return super().on_call(name, op, func, args, kwargs)
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x = named.pop("input")
        del named["weight"]
        named.pop("bias", None)
        reads = self.sites.inputs.get(name, {})
        if 0 in reads:
            x = self.round(reads[0], x)
        constants = self.finished.layers[name]
        kind = torch.float64 if layer.wide else torch.float32
        q = (x.double() / layer.step).round().to(kind)
        weight = getattr(self.finished, constants.weight).to(kind)
        sums = func(q, weight, None, *args[3:], **named)
        axis = 1 if op != "linear" else sums.dim() - 1

        def spread(name: str) -> Tensor:
            values: Tensor = getattr(self.finished, name)
            values = values.repeat(sums.shape[axis] // len(values))  # of a transposed one's groups
            return values.reshape([-1 if n == axis else 1 for n in range(sums.dim())])

        assert constants.scale is not None
        y = self.owner.arithmetic.scaled(
            sums,
            float32(layer.step),
            spread(constants.scale).float(),
            None if constants.bias is None else spread(constants.bias),
            None if layer.output is None else float32(layer.output),
        )
        quantizer = self.output(name)
        return y if quantizer is None else self.round(quantizer, y)

    def _pair(self, name: str, op: str, args: Any, kwargs: Any) -> Tensor:
        """What two rounded tensors make, in float64 where a rounding follows."""
        reads = self.sites.inputs.get(name, {})
        args, kwargs = self._rounded(reads, (args, kwargs)) if reads else (args, kwargs)
        both = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if name in self.sites.inner:
            both = [both[0], self.round(self.sites.inner[name], INNER[op](both[0]))]
        y = self.owner.pairs[name](*both)
        quantizer = self.output(name)
        return y if quantizer is None else self.round(quantizer, y)

    def round(self, quantizer: str, x: Tensor) -> Tensor:
        """Integers as the backend chooses them, as the float32 values that they stand for."""
        rounding = self.finished.roundings[quantizer]
        grid, scale = rounding.grid, float32(rounding.scale)
        at_input = is_input(quantizer)
        q = self.owner.arithmetic.integers(x, scale, rounding.zero_point, at_input)
        return (q.clamp(grid.qmin, grid.qmax) - rounding.zero_point) * scale
