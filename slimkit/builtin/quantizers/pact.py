"""A clip that training finds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.grid import inside, total
from slimkit.interfaces import Grid, Quantizer


class PACT(Quantizer):
    """Learns where to clip: every clipped value pulls the clip by its gradient.

    Made for activations behind a ReLU, which a learned alpha clips from above. Where the grid is
    symmetric, the clip is at alpha and -alpha; where it is not and negative values were observed,
    a second one is learned below. Both begin at the largest values observed. The paper lets weight
    decay pull alpha down: ``quantize.weight_decay`` of a recipe.

    Choi et al. 2018, PACT: Parameterized Clipping Activation for Quantized Neural Networks,
    https://arxiv.org/abs/1805.06085.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.alpha = nn.Parameter(torch.zeros(grid.channels))
        if not grid.symmetric:
            self.beta = nn.Parameter(torch.zeros(grid.channels))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Begin anew at the largest values seen."""
        rows = self.grid.rows(x.float())
        if not rows.shape[1]:
            return
        lo, hi = -rows.amin(1), rows.amax(1)
        if self.grid.symmetric:
            self.alpha.copy_(torch.maximum(self.alpha, torch.maximum(lo, hi)))
        else:
            self.alpha.copy_(torch.maximum(self.alpha, hi))
            self.beta.copy_(torch.maximum(self.beta, lo))

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range between the clips."""
        return self.grid.qparams(*self._clips())

    def forward(self, x: Tensor) -> Tensor:
        """Round `x`; the clips get the gradients of what they clip."""
        scale, zero_point = self.qparams()
        rounded = self.grid.fake_quantize(x.detach(), scale, zero_point)
        ends = [(q - zero_point) * scale for q in (self.grid.qmin - 0.5, self.grid.qmax + 0.5)]
        clips = [self.grid.spread(clip, x) for clip in self._clips()]
        return _Clip.apply(x, rounded, *clips, *(self.grid.spread(end, x) for end in ends))

    def _clips(self) -> tuple[Tensor, Tensor]:
        alpha = self.alpha.abs()
        if not self.grid.symmetric:
            return -self.beta.abs(), alpha
        return (-alpha if self.grid.signed else torch.zeros_like(alpha)), alpha


class _Clip(torch.autograd.Function):
    """Gives `rounded`; what is over a clip pulls it, what is within the ends passes gradients.

    The ends are those of the grid, half a step outside of the clips.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rounded: Tensor,
        low: Tensor,
        high: Tensor,
        below: Tensor,
        above: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, low, high, below, above)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, high, below, above = ctx.saved_tensors
        to_low = total(inside(gradient, x, -math.inf, low), low)
        to_high = total(inside(gradient, x, high, math.inf), high)
        return inside(gradient, x, below, above), None, to_low, to_high, None, None
