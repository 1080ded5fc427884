"""The integer grid that a tensor is rounded to, and the arithmetic on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    per_channel: bool = False
    axis: int = 0
    channels: int = 1

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + int(self.symmetric)

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
        if self.symmetric:
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        zero_point = (self.qmin - lo / scale).round().clamp(self.qmin, self.qmax)
        return scale, zero_point.to(torch.int32)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The integers of `x` as float: clamp(round(x * (1 / scale)) + zero_point), half to even.

        Multiplying by the reciprocal is what PyTorch's own quantize operations do.
        """
        q = (x * (1 / self._spread(scale, x))).round() + self._spread(zero_point, x)
        return q.clamp(self.qmin, self.qmax)

    def dequantize(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The values that the integers `q` stand for: (q - zero_point) * scale."""
        return (q - self._spread(zero_point, q)) * self._spread(scale, q)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Round `x` to the grid and back, with a straight-through gradient.

        The gradient with respect to `x` is 1 where `x` is inside the grid's range and 0 where it
        is clipped (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). Computed in float32
        whatever the precision of `x`, which the result has too. Equals `dequantize` of `quantize`;
        a scale that requires a gradient gets one through the rounding.
        """
        given, x = x.dtype, x.float()
        if scale.requires_grad:
            step, zero = self._spread(scale, x), self._spread(zero_point, x)
            scaled = x * (1 / step)
            rounded = scaled + (scaled.round() - scaled).detach() + zero
            return ((rounded.clamp(self.qmin, self.qmax) - zero) * step).to(given)
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

    def _spread(self, per_scale: Tensor, x: Tensor) -> Tensor:
        """Reshape one value per scale so that it broadcasts against `x`."""
        if not self.per_channel:
            return per_scale.reshape(()).to(x.device)
        shape = [1] * x.dim()
        shape[self.axis] = self.channels
        return per_scale.reshape(shape).to(x.device)
