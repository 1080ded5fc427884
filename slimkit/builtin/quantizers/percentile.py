"""A range that clips the rarest values."""

from __future__ import annotations

from torch import Tensor

from slimkit.builtin.quantizers.histogram import Histogram, HistogramQuantizer
from slimkit.interfaces import Grid


class Percentile(HistogramQuantizer):
    """Covers the central `percentile` of the observed values and clips the rest.

    A symmetric grid clips by absolute value, an asymmetric one half of the rest on either side.
    A bound is exact to one bin: 1/2048 of the largest value at most.

    Wu et al. 2020, Integer Quantization for Deep Learning Inference,
    https://arxiv.org/abs/2004.09602, section 5.

    Args:
        percentile: of all observed values, over 50 and up to 100; 100 clips nothing.
    """

    def __init__(self, grid: Grid, *, percentile: float = 99.99) -> None:
        super().__init__(grid)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be over 50 and at most 100, not {percentile}")
        self.percentile = percentile

    def clip(self, seen: Histogram) -> tuple[float, float]:
        """The range between the two percentiles."""
        tail = seen.total * (100 - self.percentile) / 100
        if self.grid.symmetric:
            bound = _bins(seen.magnitudes(self.grid), tail) * seen.width
            return -bound, bound
        return -_bins(seen.below, tail / 2) * seen.width, _bins(seen.above, tail / 2) * seen.width


def _bins(counts: Tensor, tail: float) -> int:
    """How many bins hold all values but `tail`, at least one."""
    beyond = counts.sum() - counts.cumsum(0)
    return 1 + int((beyond > tail).sum())
