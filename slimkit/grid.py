"""The integer grid that a tensor is rounded to, and the arithmetic on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_MANTISSA = 2**23 - 1  # the bits of a float32 below its exponent
_LARGEST_POWER = 254 << 23  # 2**127 as an integer of the same bits


@dataclass(frozen=True)
class Grid:
    """Which integers a tensor may become, and over which slices one scale is shared.

    Args:
        bits: width of the integer, 2 to 16.
        signed: whether the integers start below zero.
        symmetric: whether the zero point is fixed at integer 0. Signed symmetric grids are
            narrow, -(2**(bits-1) - 1) to 2**(bits-1) - 1, so that a weight and its negation are
            both on the grid.
        per_channel: whether every slice along `axis` has a scale of its own.
        axis: the dimension of those slices.
        channels: the number of slices; slimkit fills it in with `sized` when it meets the tensor.
        full: whether a signed symmetric grid has the integer -(2**(bits-1)) as well, as a runtime
            that saturates to the whole type does. Scales are those of the narrow one.
        power_of_two: whether scales are powers of two, for a device that shifts instead of
            multiplying: the smallest that covers the range.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    per_channel: bool = False
    axis: int = 0
    channels: int = 1
    full: bool = False
    power_of_two: bool = False

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + int(self.symmetric and not self.full)

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return 2 ** (self.bits - int(self.signed)) - 1

    def sized(self, tensor: Tensor, axis: int = 0) -> Grid:
        """The same grid for the slices of `tensor` along `axis` (unchanged if not per channel)."""
        if not self.per_channel:
            return self
        return replace(self, axis=axis, channels=tensor.shape[axis])

    def rows(self, x: Tensor) -> Tensor:
        """View `x` as one row per scale: (channels, n) per channel, else (1, n)."""
        if not self.per_channel:
            return x.reshape(1, -1)
        return x.transpose(0, self.axis).reshape(self.channels, -1)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and largest value per scale of `x`, which is not empty, in float32.

        Of shape (channels,) per channel, else without a dimension. NaN in `x` shows in both.
        """
        if self.per_channel:
            rows = self.rows(x)
            lo, hi = rows.amin(1), rows.amax(1)
        else:
            lo, hi = x.aminmax()
        return lo.float(), hi.float()

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point so that the grid covers [lo, hi] and holds 0 exactly.

        Args:
            lo: smallest value per scale, shape (channels,), in the tensor's units.
            hi: largest value per scale, shape (channels,).

        Returns:
            scale: float32, shape (channels,), positive and finite (a range of no width gives 1).
            zero_point: int32, shape (channels,), within [qmin, qmax].
        """
        lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
        if self.symmetric:
            scale = torch.maximum(-lo, hi) / self.qmax
        else:
            scale = (hi - lo) / (self.qmax - self.qmin)
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        scale = self.steps(scale)
        if self.symmetric:
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        zero_point = (self.qmin - lo / scale).round().clamp(self.qmin, self.qmax)
        return scale, zero_point.to(torch.int32)

    def steps(self, scale: Tensor) -> Tensor:
        """The smallest scales that the grid may have and that are at least `scale`.

        Those of `scale` themselves, or the powers of two from them on.

        Args:
            scale: float32, positive and normal numbers, any shape.

        Returns:
            float32, the same shape, at most 2**127.
        """
        if not self.power_of_two:
            return scale
        bits = scale.detach().contiguous().view(torch.int32)
        raised = (bits + _MANTISSA) & ~_MANTISSA  # what is no power of two carries
        return raised.clamp(max=_LARGEST_POWER).view(torch.float32)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The integers of `x` as float: clamp(round(x * (1 / scale)) + zero_point), half to even.

        Multiplying by the reciprocal is what PyTorch's own quantize operations do.
        """
        q = (x * (1 / self.spread(scale, x))).round() + self.spread(zero_point, x)
        return q.clamp(self.qmin, self.qmax)

    def dequantize(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The values that the integers `q` stand for: (q - zero_point) * scale."""
        return (q - self.spread(zero_point, q)) * self.spread(scale, q)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Round `x` to the grid and back, with a straight-through gradient.

        The gradient with respect to `x` is 1 where `x` is inside the grid's range and 0 where it
        is clipped (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). Computed in float32
        whatever the precision of `x`, which the result has too. Equals `dequantize` of `quantize`.

        A scale that requires a gradient gets that of LSQ (Esser et al. 2020,
        https://arxiv.org/abs/1902.08153, equation 3); so does a zero point that is float, holds
        integers within [qmin, qmax] and requires one (LSQ+, https://arxiv.org/abs/2004.09576).
        """
        learned = scale.requires_grad or zero_point.requires_grad
        if learned or x.device.type == "cpu":
            step, zero = self.spread(scale, x), self.spread(zero_point, x)
            if torch.is_grad_enabled() and (learned or x.requires_grad):
                return _Rounding.apply(x, step, zero, self.qmin, self.qmax)
            return _rounded(x, *_limits(step, zero, self.qmin, self.qmax))
        # one kernel, where the above are four
        given, x = x.dtype, x.float()
        scale, zero_point = scale.to(x.device), zero_point.to(x.device, torch.int32)
        if self.per_channel:
            y = torch.fake_quantize_per_channel_affine(
                x, scale, zero_point, self.axis, self.qmin, self.qmax
            )
        else:
            y = torch.fake_quantize_per_tensor_affine(
                x, scale.reshape(()), zero_point.reshape(()), self.qmin, self.qmax
            )
        return y.to(given)

    def spread(self, per_scale: Tensor, x: Tensor) -> Tensor:
        """Reshape one value per scale so that it broadcasts against `x`."""
        if not self.per_channel:
            return per_scale.reshape(()).to(x.device)
        shape = [1] * x.dim()
        shape[self.axis] = self.channels
        return per_scale.reshape(shape).to(x.device)


_Value = Tensor | float


def _limits(
    step: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[_Value, _Value, _Value, _Value]:
    """1 / step, step, and the grid's ends counted from its zero point."""
    inverse, size, zero_point = _number(1 / step), _number(step), _number(zero)
    return inverse, size, qmin - zero_point, qmax - zero_point


def _times(x: Tensor, factor: _Value) -> Tensor:
    """The product in float32, in memory of its own."""
    return x * factor if x.dtype == torch.float32 else x.float().mul_(factor)


def _rounded(x: Tensor, inverse: _Value, step: _Value, low: _Value, high: _Value) -> Tensor:
    """``clamp(round(x / step), low, high) * step`` in float32, given back as `x` came."""
    y = _times(x, inverse)
    return y.round_().clamp_(low, high).mul_(step).to(x.dtype)  # type: ignore[arg-type]


def inside(values: Tensor, x: Tensor, low: _Value, high: _Value) -> Tensor:
    """`values` where low < x < high, else 0; the limits broadcast against `x`."""
    low, high = _number(low), _number(high)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((x > low) & (x < high), values, 0.0)
    return torch.ops.aten.hardtanh_backward(values, x, low, high)  # several times faster


def _number(value: _Value) -> _Value:
    """A plain number where it costs no wait for a device: PyTorch has faster loops for them."""
    if isinstance(value, Tensor) and not value.dim() and value.device.type == "cpu":
        return value if torch.compiler.is_compiling() else value.item()
    return value


def total(values: Tensor, like: Tensor) -> Tensor:
    """`values` summed up in float32 to the shape of `like`."""
    if not like.dim():
        return values.sum(dtype=torch.float32)
    return values.float().sum_to_size(like.shape)


_SLICE = 2**19  # values; what is computed from them stays in a processor's cache


class _Rounding(torch.autograd.Function):
    """`_rounded` with the gradients of `Grid.fake_quantize`.

    torch.fake_quantize_per_tensor_affine computes the same; on a CPU it takes ten times as long,
    as it goes value by value.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.limits = _limits(step, zero, qmin, qmax)
        return _rounded(x, *ctx.limits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        inverse, size, low, high = ctx.limits
        _, of_step, of_zero, *_ = ctx.needs_input_grad
        passed = inside(gradient, x, (low - 0.5) * size, (high + 0.5) * size)
        to_step = to_zero = None
        if of_step:
            to_step = torch.zeros_like(step)
            for part, its_gradient in _slices(x, gradient, whole=step.dim() > 0):
                v = _times(part, inverse)
                unclipped = inside(v, v, low - 0.5, high + 0.5)
                slope = v.round_().clamp_(low, high).sub_(unclipped)
                to_step += total(slope.mul_(its_gradient), step)
        if of_zero:
            to_zero = (total(passed, step) - total(gradient, step)) * step
        return passed, to_step, to_zero, None, None


def _slices(x: Tensor, gradient: Tensor, *, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both along the first dimension."""
    if whole or x.numel() <= _SLICE or x.device.type != "cpu":
        yield x, gradient
        return
    rows = max(1, _SLICE * len(x) // x.numel())
    yield from zip(x.split(rows), gradient.split(rows), strict=True)
