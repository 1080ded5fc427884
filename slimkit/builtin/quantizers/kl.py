"""A range whose integers tell most about the distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.builtin.quantizers.histogram import Histogram, HistogramQuantizer

CANDIDATES = 256  # ends of a range that are tried, evenly apart
ROUNDS = 4  # in which the two ends of an asymmetric range are chosen in turn


class KL(HistogramQuantizer):
    """Covers the range that loses the least information: entropy calibration.

    For each candidate range, P is the histogram with what is clipped added to its outermost bin,
    and Q the same bins, without what is clipped, when all that share an integer look alike; the
    range with the smallest Kullback-Leibler divergence of Q from P is taken. Candidates are about
    1/256 of the largest value apart and have at least one bin for each integer: where the grid has
    more integers than the histogram has bins (13 bits and more), nothing is clipped. Zeros are not
    counted, as every grid holds them exactly. The ends of an asymmetric grid's range are chosen in
    turn, each for the values that the other leaves.

    Made for activations; on the grids of weights it takes some milliseconds a channel.

    Migacz 2017, 8-bit Inference with TensorRT (GTC S7310); ncnn's ncnn2table does the same.
    """

    def clip(self, seen: Histogram) -> tuple[float, float]:
        """The candidate of the smallest divergence."""
        grid, width = self.grid, seen.width
        if grid.symmetric:
            end = _best_end(seen.magnitudes(grid), 0, grid.qmax + 1)
            return -end * width, end * width
        levels = grid.qmax - grid.qmin + 1
        counts = torch.cat([seen.below.flip(0), seen.above])
        zero = len(seen.below)
        left, right = _used(seen.below), _used(seen.above)
        for turn in range(ROUNDS):
            before = left, right
            if turn % 2 == 0 and right:
                right = _best_end(counts[zero - left :], left, levels) - left
            elif turn % 2 and left:
                left = _best_end(counts[: zero + right].flip(0), right, levels) - right
            if turn and before == (left, right):
                break
        return -left * width, right * width


def _used(counts: Tensor) -> int:
    """How many bins there are up to the last that holds a value."""
    return int((counts > 0).nonzero().amax()) + 1 if counts.any() else 0


def _best_end(counts: Tensor, least: int, levels: int) -> int:
    """Behind which bin to clip so that the divergence is smallest; not within `least` bins."""
    used = max(_used(counts), least)
    first = max(levels, least + 1)
    if used <= first:
        return used
    step = max(1, (used - least) // CANDIDATES)
    ends = torch.arange(used, first - 1, -step)
    return int(ends[divergence(counts, ends, levels).argmin()])


def divergence(counts: Tensor, ends: Tensor, levels: int) -> Tensor:
    """Kullback-Leibler divergence in nats from clipping `counts` behind each of `ends` bins.

    The bins within an end are shared out to `levels` integers as evenly as whole bins allow:
    integer g has the bins from ``g * end // levels`` on. Sums over bins are differences of
    cumulative sums, so that a candidate costs as much as there are integers.

    Args:
        counts: shape (bins,), float64.
        ends: shape (candidates,), int64, each at least `levels`.
        levels: number of integers.

    Returns:
        Shape (candidates,).
    """
    total = counts.sum()
    groups = torch.arange(levels + 1) * ends[:, None] // levels  # (candidates, levels + 1)
    inside = _cumulative(counts)[groups].diff()  # values of each integer, unclipped
    filled = _cumulative((counts > 0).double())[groups].diff()
    entropy = _cumulative(torch.special.xlogy(counts, counts))[ends]
    clipped = total - _cumulative(counts)[ends]
    last = counts[ends - 1]
    entropy += torch.special.xlogy(last + clipped, last + clipped) - torch.special.xlogy(last, last)
    filled[:, -1] += ((last == 0) & (clipped > 0)).double()
    outermost = inside[:, -1].clone()
    inside[:, -1].clamp_(min=1)  # where all is clipped, Q would be 0 and the divergence infinite
    level = inside / filled.clamp(min=1) / total  # Q's bins
    inside[:, -1] = outermost + clipped  # P's values of each integer
    return entropy / total - total.log() - torch.special.xlogy(inside / total, level).sum(1)


def _cumulative(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
