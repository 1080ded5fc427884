"""A quantizer: a way to choose the range of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.interfaces import Grid, Quantizer


class LastBatch(Quantizer):
    """Covers exactly the values of the last batch that it observed."""

    follows_batches = True

    lo: Tensor
    hi: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("lo", torch.zeros(grid.channels))
        self.register_buffer("hi", torch.zeros(grid.channels))

    def observe(self, x: Tensor) -> None:
        """Remember the smallest and the largest value of `x`; without any, change nothing."""
        if x.numel():
            lo, hi = self.grid.ends(x.detach())
            self.lo.copy_(lo)
            self.hi.copy_(hi)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of that range."""
        return self.grid.qparams(self.lo, self.hi)
