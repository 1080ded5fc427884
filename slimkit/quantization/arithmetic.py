"""How each kind of runtime rounds and scales, operation by operation in the same precision.

`Scheme.arithmetic` names one of these. Each step below is rounded to float32 where the runtime
rounds it, which decides on which side of the edge between two integers a value falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Arithmetic(Protocol):
    """What a runtime computes around its sums of integers."""

    def integers(self, x: Tensor, scale: Tensor, zero_point: int, at_input: bool) -> Tensor:
        """The integers that `x` is rounded to, not yet clamped.

        Args:
            x: float values.
            scale: float32, a number.
            zero_point: added.
            at_input: whether `x` enters the model here, and no layer makes it.
        """

    def scaled(
        self,
        sums: Tensor,
        step: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        output: Tensor | None,
    ) -> Tensor:
        """A layer's output.

        Args:
            sums: of products of integers, without the bias.
            step: float32, the input's scale.
            scale: float32, the weights' scale of each channel, shaped to spread over `sums`.
            bias: the same shape; integers where the scheme's bias is one.
            output: float32, the scale that the output is rounded with next; None if it is not.
        """


class Requantize:
    """ONNX Runtime: the sum with its bias times one float32 factor, half to even."""

    def integers(self, x: Tensor, scale: Tensor, zero_point: int, at_input: bool) -> Tensor:
        """`x` divided by its scale."""
        del at_input
        return (x / scale.to(x.dtype)).float().round() + zero_point

    def scaled(
        self,
        sums: Tensor,
        step: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        output: Tensor | None,
    ) -> Tensor:
        """In float64 where a rounding follows.

        That is the float32 value that the runtime rounds, times the output's scale, so that
        dividing by that scale gives it back.
        """
        if bias is not None:
            sums = sums.double() + bias.double()
        if output is None:
            return sums.float() * (step * scale)
        return (sums.float() * (step * scale / output)).double() * output.double()


class Dequantize:
    """ncnn: the sum times one float32 scale plus the bias, rounded once; half away from zero."""

    def integers(self, x: Tensor, scale: Tensor, zero_point: int, at_input: bool) -> Tensor:
        """`x` times the reciprocal of its scale."""
        del at_input
        scaled = x.float() * (1.0 / scale.double()).float()
        return scaled.sign() * (scaled.abs() + 0.5).floor() + zero_point

    def scaled(
        self,
        sums: Tensor,
        step: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        output: Tensor | None,
    ) -> Tensor:
        """One fused multiply-add."""
        del output
        factor = 1.0 / ((1.0 / step.double()).float() * (1.0 / scale.double()).float())
        y = sums.double() * factor.double()
        return (y if bias is None else y + bias.double()).float()


class Fused:
    """OpenVINO: the sum times one float32 scale, plus the bias; rounding fused behind it."""

    def integers(self, x: Tensor, scale: Tensor, zero_point: int, at_input: bool) -> Tensor:
        """A fused multiply-add where a layer made `x`, half to even."""
        inverse = 1.0 / scale
        if at_input:
            return (x.float() * inverse).round() + zero_point
        shift = -((-zero_point * scale) * inverse)
        return (x.double() * inverse.double() + shift.double()).float().round()

    def scaled(
        self,
        sums: Tensor,
        step: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        output: Tensor | None,
    ) -> Tensor:
        """Rounded to float32 after the product and after the sum."""
        del output
        y = sums.float() * (step * scale)
        return y if bias is None else y + bias.float()


class Reciprocal(Requantize):
    """XNNPACK: sums as ONNX Runtime's, and roundings that multiply."""

    def integers(self, x: Tensor, scale: Tensor, zero_point: int, at_input: bool) -> Tensor:
        """`x` times the reciprocal of its scale, half to even.

        What a layer made comes in float64 and is the value that the layer rounds, times its scale.
        """
        if x.dtype == torch.float64:
            return super().integers(x, scale, zero_point, at_input)
        return (x * (1 / scale)).round() + zero_point


def fixed_point_sum(
    a: Tensor, b: Tensor, steps: tuple[float, float], output: float, sign: int = 1
) -> Tensor:
    """XNNPACK's sum of two tensors of 8 bits, in steps of the output: factors of 21 bits.

    Args:
        a: integers, counted from their zero point.
        b: the same; may be of another shape that spreads over `a`.
        steps: what one step of `a` and one of `b` stand for.
        output: what one step of the sum stands for.
        sign: -1 for the difference.

    Returns:
        Integers as float64, counted from the zero point and not yet clamped.
    """
    ratios = [float(float32(step) / float32(output)) for step in steps]
    shift = 21 - math.frexp(max(ratios))[1]  # the larger factor has 21 bits
    factors = [round(math.ldexp(ratio, shift)) for ratio in ratios]
    sums = a.long() * factors[0] + sign * b.long() * factors[1]
    return ((sums + (1 << (shift - 1))) >> shift).double()


def scaled_product(a: Tensor, b: Tensor, steps: tuple[float, float], output: float) -> Tensor:
    """XNNPACK's product of two tensors of 8 bits: one float32 factor, half to even.

    Arguments and result are those of `fixed_point_sum`.
    """
    factor = float32(steps[0]) * float32(steps[1]) / float32(output)
    return ((a.long() * b.long()).float() * factor).round().double()


INTEGER_PAIRS = frozenset({"reciprocal"})
"""Arithmetics in which two tensors meet as `fixed_point_sum` and `scaled_product` say."""

ARITHMETICS: Mapping[str, Arithmetic] = {
    "requantize": Requantize(),
    "dequantize": Dequantize(),
    "fused": Fused(),
    "reciprocal": Reciprocal(),
}


def float32(value: float) -> Tensor:
    """A number as the runtimes hold it."""
    return torch.tensor(value, dtype=torch.float32)
