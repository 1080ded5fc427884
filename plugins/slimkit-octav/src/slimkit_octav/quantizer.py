"""A range whose end is the root of an equation."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.interfaces import Grid, Quantizer
from slimkit_octav.magnitudes import Magnitudes

HALVINGS = 48  # of the interval that the root lies in
ROUNDS = 3  # in which the two ends of an asymmetric range are found in turn


class OCTAV(Quantizer):
    """Clips where the expected squared error of rounding and clipping is least.

    A range that ends at s rounds what is inside to steps of s / n, which costs
    ``s**2 / (12 n**2)`` a value, and cuts off what lies outside, which costs its squared distance.
    The sum is least where ``s = E[x; x > s] / (P[0 < x <= s] / (12 n**2) + P[x > s])``. The paper
    iterates that as Newton's method, which goes round in circles where nothing is left outside
    (a constant tensor); the slope rises with s, so here its root is found by halving. Zeros are not
    counted, as every grid holds them. An asymmetric grid has two ends, found in turn; n is its
    number of steps, and the distance between the ends takes the place of s.

    `mse` tries shares of the largest value for the same aim, and counts the error of the very
    values; this finds the end without a search, from the expected error of rounding.

    Sakr et al. 2022, Optimal Clipping and Magnitude-aware Differentiation for Improved
    Quantization-aware Training (ICML), https://arxiv.org/abs/2206.06501, equation 9.
    """

    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("low", torch.zeros(grid.channels))  # per channel, the range so far
        self.register_buffer("high", torch.zeros(grid.channels))
        self.seen = None if grid.per_channel else Magnitudes()

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Count the values of `x`; per channel, widen the range to what suits `x`."""
        if not x.numel():
            return
        if self.seen is not None:
            self.seen.count(x)
            return
        rows = self.grid.rows(x.float()).double()
        low, high = self._range((rows < 0) * -rows, (rows > 0) * rows, (rows != 0).double())
        self.low.copy_(torch.minimum(self.low, low.float()))
        self.high.copy_(torch.maximum(self.high, high.float()))

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range."""
        if self.seen is None:
            return self.grid.qparams(self.low, self.high)
        below, above, counts = self.seen.values()
        low, high = self._range(below, above, counts)
        return self.grid.qparams(low.float().to(self.low.device), high.float().to(self.low.device))

    def _range(self, below: Tensor, above: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the range, each of shape (rows,).

        Args:
            below: distances of values under zero, 0 for others, shape (rows, n), float64.
            above: values over zero, 0 for others, same shape.
            counts: how often each occurs, same shape.
        """
        grid = self.grid
        if grid.symmetric:
            sizes = torch.maximum(below, above) if grid.signed else above
            end = best_end(sizes, counts, grid.qmax, torch.zeros_like(sizes[:, 0]))
            return -end, end
        steps = grid.qmax - grid.qmin
        low, high = below.amax(1), above.amax(1)
        for _ in range(ROUNDS):
            high = best_end(above, counts, steps, low)
            low = best_end(below, counts, steps, high)
        return -low, high


def best_end(sizes: Tensor, counts: Tensor, steps: int, other: Tensor) -> Tensor:
    """Where to clip `sizes`, shape (rows,); never beyond the largest.

    Args:
        sizes: distances from zero on this side, 0 for other values, shape (rows, n).
        counts: how often each occurs, same shape.
        steps: of the grid from one end to the other.
        other: how far the other end is from zero, shape (rows,).
    """
    rounding = 1 / (12 * steps**2)
    low, high = torch.zeros_like(other), sizes.amax(1)
    for _ in range(HALVINGS):
        end = (low + high) / 2
        beyond = (sizes - end[:, None]).clamp_(min=0)
        inside = (counts * (beyond == 0)).sum(1)
        rising = (end + other) * inside * rounding > (counts * beyond).sum(1)
        low, high = torch.where(rising, low, end), torch.where(rising, end, high)
    return high
