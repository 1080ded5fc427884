"""The range of everything seen."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.interfaces import Grid, Quantizer


class MinMax(Quantizer):
    """Covers the smallest and the largest value it has observed, so that nothing is clipped.

    Jacob et al. 2018, https://arxiv.org/abs/1712.05877. One outlier widens the range for all.
    """

    lo: Tensor
    hi: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("lo", torch.zeros(grid.channels))
        self.register_buffer("hi", torch.zeros(grid.channels))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Widen the range to hold `x`; zero is always inside."""
        if not x.numel():
            return
        lo, hi = self.grid.ends(x)
        self.lo.copy_(torch.minimum(self.lo, lo))
        self.hi.copy_(torch.maximum(self.hi, hi))

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the observed range."""
        return self.grid.qparams(self.lo, self.hi)
