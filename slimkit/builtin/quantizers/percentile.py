"""A range that clips the rarest values."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.interfaces import Grid, Quantizer

BINS = 4096


class Percentile(Quantizer):
    """Covers the central `percentile` of the observed values and clips the rest.

    Values are counted in a histogram of 4096 bins around zero, whose width is a power of two and
    doubles when a larger value comes, so memory is constant and the result does not depend on the
    order or size of the batches. A bound is exact to one bin: 1/1024 of the largest value at most.

    Wu et al. 2020, Integer Quantization for Deep Learning Inference,
    https://arxiv.org/abs/2004.09602, section 5.

    Args:
        percentile: of all observed values, over 50 and up to 100; 100 clips nothing.
    """

    counts: Tensor
    width: Tensor
    lo: Tensor
    hi: Tensor

    def __init__(self, grid: Grid, *, percentile: float = 99.99) -> None:
        super().__init__(grid)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be over 50 and at most 100, not {percentile}")
        self.percentile = percentile
        self.register_buffer("counts", torch.zeros(grid.channels, BINS, dtype=torch.float64))
        self.register_buffer("width", torch.zeros(grid.channels))
        self.register_buffer("lo", torch.zeros(grid.channels))
        self.register_buffer("hi", torch.zeros(grid.channels))

    def observe(self, x: Tensor) -> None:
        """Count `x` into the histogram of its channel."""
        rows = self.grid.rows(x.detach().float())
        if not rows.shape[1]:
            return
        self.lo.copy_(torch.minimum(self.lo, rows.amin(1)))
        self.hi.copy_(torch.maximum(self.hi, rows.amax(1)))
        self._widen(torch.maximum(-self.lo, self.hi))
        # width 0: only zeros so far, which all fall into the bin right of the middle
        step = torch.where(self.width > 0, self.width, torch.ones_like(self.width))
        bins = (rows / step[:, None]).floor().long().clamp(-BINS // 2, BINS // 2 - 1) + BINS // 2
        offset = torch.arange(len(bins), device=bins.device)[:, None] * BINS
        counted = torch.bincount((bins + offset).flatten(), minlength=self.counts.numel())
        self.counts += counted.view_as(self.counts)

    def _widen(self, largest: Tensor) -> None:
        """Double the bins' width until `largest` fits, merging neighbours pair by pair."""
        needed = torch.exp2(torch.floor(torch.log2(largest)) + 2 - (BINS.bit_length() - 1))
        needed = torch.where(largest > 0, needed, torch.zeros_like(needed))
        for row in (needed > self.width).nonzero().flatten().tolist():
            if self.width[row] > 0:
                counts, half = self.counts[row], BINS // 2
                factor = int((needed[row] / self.width[row]).clamp(max=half))
                right = counts[half:].view(-1, factor).sum(1)
                left = counts[:half].view(-1, factor).sum(1)
                counts.zero_()
                counts[half : half + len(right)] = right
                counts[half - len(left) : half] = left
            self.width[row] = needed[row]

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range between the two percentiles."""
        total = self.counts.sum(1, keepdim=True)
        cumulative = self.counts.cumsum(1)
        tail = total * (100 - self.percentile) / 100
        if self.grid.symmetric:  # clip by absolute value: fold the left half onto the right
            half = BINS // 2
            folded = self.counts[:, half:] + self.counts[:, :half].flip(1)
            inside = (folded.cumsum(1) < total - tail).sum(1) + 1
            bound = inside * self.width
            return self.grid.qparams(torch.maximum(self.lo, -bound), torch.minimum(self.hi, bound))
        low = (cumulative <= tail / 2).sum(1) - BINS // 2
        high = (cumulative < total - tail / 2).sum(1) + 1 - BINS // 2
        lo = torch.maximum(self.lo, low * self.width)
        hi = torch.minimum(self.hi, high * self.width)
        return self.grid.qparams(lo, hi)
