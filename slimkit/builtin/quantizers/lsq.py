"""A step size that training finds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.interfaces import Grid, Quantizer


class LSQ(Quantizer):
    """Learns the size of its step (and, on asymmetric grids, its offset) by gradient.

    The step begins at what covers everything observed or at ``2 mean|x| / sqrt(qmax)``, whichever
    is smaller: at 8 bits that is the former nearly always, as for minmax, at 4 bits and below the
    latter. From then on the optimizer moves it, by gradients divided by ``sqrt(n qmax)``, where n
    is the number of values that share the step. Without training it is a quantizer as any other.

    Esser et al. 2020, Learned Step Size Quantization, https://arxiv.org/abs/1902.08153. On an
    asymmetric grid the range's lower end is learned too, as in LSQ+ (Bhalgat et al. 2020,
    https://arxiv.org/abs/2004.09576); it is rounded to a whole step, so that zero is on the grid.

    Unlike there, the parameter is the ratio to the first step, and a gradient counts as 1 at most.
    SGD moves the step as in the paper, but never by more than its learning rate's share of it (a
    step of 0.001 would else leap where a single weight is clipped at 8 bits), and Adam, whose
    steps do not know how small a parameter is, moves it by shares as well.
    """

    lo: Tensor
    hi: Tensor
    total: Tensor
    count: Tensor
    first: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.ratio = nn.Parameter(torch.ones(grid.channels))
        if not grid.symmetric:
            self.shift = nn.Parameter(torch.zeros(grid.channels))
        self.register_buffer("first", torch.ones(grid.channels))
        for name in ("lo", "hi"):
            self.register_buffer(name, torch.zeros(grid.channels))
        self.register_buffer("total", torch.zeros(grid.channels, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Begin anew at the step that suits all that was observed."""
        rows = self.grid.rows(x.float())
        if not rows.shape[1]:
            return
        self.lo.copy_(torch.minimum(self.lo, rows.amin(1)))
        self.hi.copy_(torch.maximum(self.hi, rows.amax(1)))
        self.total += rows.abs().mean(1).double() * rows.shape[1]
        self.count += rows.shape[1]
        covering, _ = self.grid.qparams(self.lo, self.hi)
        typical = (2 * self.total / self.count / math.sqrt(self.grid.qmax)).float()
        share = torch.where(typical > 0, typical / covering, torch.ones_like(typical)).clamp(max=1)
        self.first.copy_(covering * share)
        self.ratio.fill_(1.0)
        if not self.grid.symmetric:
            self.shift.copy_(self.lo * share / self._width)

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor]:
        """The step as it is learned so far, and the whole number of steps below zero."""
        scale, zero_point = self._learned(1.0)
        return scale, zero_point.to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Round `x`; step and offset get their gradients."""
        values = max(1, x.numel() // self.grid.channels)
        return self.grid.fake_quantize(x, *self._learned(1 / math.sqrt(values * self.grid.qmax)))

    def _learned(self, slowness: float) -> tuple[Tensor, Tensor]:
        """Step and zero point (in float), whose gradients arrive times `slowness`."""
        step = _Times.apply(self.ratio, self.first, slowness)
        step = step.abs().clamp(min=torch.finfo(torch.float32).tiny)
        if self.grid.power_of_two:  # the gradient passes to the step that is rounded up
            step = self.grid.steps(step) + (step - step.detach())
        if self.grid.symmetric:
            return step, torch.zeros_like(self.first)
        exact = self.grid.qmin - _Times.apply(self.shift, self._width, slowness) / step
        exact = exact.clamp(self.grid.qmin, self.grid.qmax)
        return step, exact.detach().round() + (exact - exact.detach())  # to the last bit whole

    @property
    def _width(self) -> Tensor:
        """From the lower to the upper end of the first range."""
        return self.first * (self.grid.qmax - self.grid.qmin)


class _Times(torch.autograd.Function):
    """``ratio * unit``; the ratio gets the gradient in units, times `slowness`, between -1 and 1.

    Per unit, so that the product moves under SGD as a parameter of its own would.
    """

    @staticmethod
    def forward(ctx: Any, ratio: Tensor, unit: Tensor, slowness: float) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.slowness = slowness
        return ratio * unit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return (gradient * ctx.slowness / unit).clamp(-1, 1), None, None
