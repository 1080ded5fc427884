"""Counts values by their distance from zero, in memory of constant size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BINS = 4096  # on either side of zero
NARROWEST = 2.0**-100


class Magnitudes(nn.Module):
    """How many values lie in each bin on either side of zero, and their sum.

    Bins are as wide as a power of two, which doubles when a larger value comes; so neither the
    order nor the size of the batches changes the result. Zeros are not counted.
    """

    counts: Tensor
    sums: Tensor
    width: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, BINS, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(2, BINS, dtype=torch.float64))
        self.register_buffer("width", torch.tensor(NARROWEST, dtype=torch.float64))

    def count(self, x: Tensor) -> None:
        """Count the values of `x`, of any shape.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        values = x.reshape(-1).double()
        largest = float(values.abs().amax())
        if not math.isfinite(largest):
            raise ValueError("a tensor to observe holds NaN or infinity")
        self._widen(largest)
        for side, sizes in enumerate((-values[values < 0], values[values > 0])):
            bins = (sizes / self.width).ceil().long().clamp(1, BINS) - 1
            self.counts[side] += torch.bincount(bins, minlength=BINS)
            self.sums[side] += torch.bincount(bins, weights=sizes, minlength=BINS)

    def _widen(self, largest: float) -> None:
        """Make the bins wide enough, by merging neighbours."""
        wanted = 2.0 ** math.ceil(math.log2(largest / BINS)) if largest else NARROWEST
        factor = min(wanted / float(self.width), float(BINS))
        if factor <= 1:
            return
        if self.counts.any():
            for held in (self.counts, self.sums):
                merged = held.reshape(2, -1, int(factor)).sum(2)
                held.zero_()[:, : merged.shape[1]] = merged
        self.width.fill_(wanted)

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distances below zero, distances above, and how often each occurs; each (1, 2 * BINS).

        A bin stands for the mean of its values.
        """
        means = self.sums / self.counts.clamp(min=1)
        none = torch.zeros_like(means[0])
        below, above = torch.cat([means[0], none]), torch.cat([none, means[1]])
        return below[None], above[None], self.counts.reshape(1, -1)
