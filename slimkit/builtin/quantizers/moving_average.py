"""A range that follows the batches."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.builtin.quantizers.minmax import MinMax
from slimkit.interfaces import Grid


class MovingAverage(MinMax):
    """Covers the exponential moving average of the batches' smallest and largest values.

    A rare outlier widens the range only for a while. Unlike the other quantizers', the range
    depends on the order and the size of the batches. A weight is a single batch: as minmax.

    Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, https://arxiv.org/abs/1712.05877, section 3.1.

    Args:
        momentum: the share of the former average in the next one, at least 0 and below 1; 0 covers
            the last batch alone.
    """

    follows_batches = True

    batches: Tensor

    def __init__(self, grid: Grid, *, momentum: float = 0.9) -> None:
        super().__init__(grid)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {momentum}")
        self.momentum = momentum
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of `x`; the first one sets it."""
        if not x.numel():
            return
        for average, end in zip((self.lo, self.hi), self.grid.ends(x), strict=True):
            moved = average.lerp(end, 1 - self.momentum)
            average.copy_(torch.where(self.batches > 0, moved, end))
        self.batches += 1
