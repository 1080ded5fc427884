"""A range from the distribution that the values most likely come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from slimkit.builtin.quantizers.histogram import HALF, Histogram, HistogramQuantizer
from slimkit.interfaces import Grid

BLOCK = 2**20  # values of weights at a time


class ACIQ(HistogramQuantizer):
    """Clips where the expected squared error is smallest, by formula.

    A Laplace and a normal distribution are fitted to the values; the likelier one says how far
    from its centre to clip, for as many integers as the grid has. The centre is zero on a
    symmetric grid and where all values have one sign (behind a ReLU), else the mean, on either side
    of which both distributions are fitted anew, as values may be skewed (behind a SiLU). Zeros are
    not counted, as every grid holds them exactly. Never covers more than was seen.

    Banner et al. 2019, Post training 4-bit quantization of convolutional networks for
    rapid-deployment, https://arxiv.org/abs/1810.05723, section 2.
    """

    def clip(self, seen: Histogram) -> tuple[float, float]:
        """The range for the middles of the bins."""
        middles = (torch.arange(HALF, dtype=torch.float64) + 0.5) * seen.width
        values = torch.cat([-middles, middles])[None]
        low, high = analytic_range(values, torch.cat([seen.below, seen.above])[None], self.grid)
        return float(low), float(high)

    def clip_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The range for the values themselves."""
        ranges = []
        for block in rows.split(max(1, BLOCK // rows.shape[1])):
            low, high = analytic_range(block.double(), (block != 0).double(), self.grid)
            low = torch.maximum(low, block.amin(1).clamp(max=0))
            ranges.append(torch.stack([low, torch.minimum(high, block.amax(1).clamp(min=0))]))
        low, high = torch.cat(ranges, dim=1).float()
        return low, high


def analytic_range(values: Tensor, counts: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range of smallest expected squared error, as two tensors of shape (rows,).

    Args:
        values: shape (rows, n), float64.
        counts: how often each occurs, same shape.
        grid: what they are rounded to.
    """
    if grid.symmetric and not grid.signed:
        counts = counts * (values > 0)  # the others become zero at any scale
    total = counts.sum(1).clamp(min=1)
    one_sided = ~(((values < 0) & (counts > 0)).any(1) & ((values > 0) & (counts > 0)).any(1))
    mean = (values * counts).sum(1) / total
    steps = grid.qmax if grid.symmetric else grid.qmax - grid.qmin
    reach = _reach(values, counts, steps)
    if grid.symmetric:
        return -reach, reach
    distance = values - mean[:, None]
    below = _reach(-distance, counts * (distance < 0), steps / 2)
    above = _reach(distance, counts * (distance > 0), steps / 2)
    low, high = torch.where(one_sided, -reach, mean - below), mean + above
    return low, torch.where(one_sided, reach, high)


def _reach(distance: Tensor, counts: Tensor, steps: float) -> Tensor:
    """`clip_distance` for values at `distance` from the centre."""
    total = counts.sum(1).clamp(min=1)
    deviation = (distance.abs() * counts).sum(1) / total
    sigma = ((distance.square() * counts).sum(1) / total).sqrt()
    return clip_distance(deviation, sigma, steps)


def clip_distance(deviation: Tensor, sigma: Tensor, steps: float) -> Tensor:
    """How far from the centre to clip, in the unit of `deviation`.

    Args:
        deviation: mean absolute distance from the centre, the scale of a Laplace distribution.
        sigma: root of the mean squared distance, the scale of a normal distribution.
        steps: of the grid between the centre and the clip.
    """
    # the likelihoods of both, at their best fit, are equal at this ratio
    laplace = deviation < sigma * math.sqrt(math.pi / (2 * math.e))
    return torch.where(laplace, deviation * laplace_clip(steps), sigma * normal_clip(steps))


@cache
def laplace_clip(steps: float) -> float:
    """Where to clip a Laplace distribution of scale 1.

    Clipping at a costs ``2 exp(-a)`` and rounding ``(a / steps)**2 / 12``; the sum is smallest
    where ``a exp(a) = 12 steps**2``. The paper has ``2**(bits - 1)`` steps, and 2.83, 3.89, 5.03.

    >>> [round(laplace_clip(2 ** (bits - 1)), 2) for bits in (2, 3, 4)]
    [2.83, 3.9, 5.03]
    """
    return _root(lambda a: a + math.log(a) - math.log(12 * steps**2))


@cache
def normal_clip(steps: float) -> float:
    """Where to clip a normal distribution of standard deviation 1.

    Clipping at a costs ``(1 + a**2) erfc(a / sqrt(2)) - a sqrt(2 / pi) exp(-a**2 / 2)``, rounding
    as much as for `laplace_clip`; this is the root of the sum's derivative.

    >>> [round(normal_clip(2 ** (bits - 1)), 2) for bits in (2, 3, 4)]
    [1.71, 2.15, 2.56]
    """

    def slope(a: float) -> float:
        clipping = a * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return 2 * clipping + a / (6 * steps**2)

    return _root(slope)


def _root(rising: Callable[[float], float]) -> float:
    """Where a function that rises from below zero crosses it, between 0 and 64."""
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high
