"""A range with the smallest rounding error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimkit.builtin.quantizers.histogram import HALF, Histogram, HistogramQuantizer
from slimkit.interfaces import Grid

COARSE = 0.92 ** torch.arange(5.0)  # shares of the largest value that are tried at a time
FINE = 0.92 ** (torch.arange(-6.0, 7.0) / 7)  # around the best of them
ROUNDS = 2  # in which the two ends of an asymmetric range are chosen in turn
NARROWEST = 2.0**-10  # share that is tried
ENOUGH, MERGED = 1024, 4  # of more filled bins, four are merged into one
BLOCK = 2**17  # values at a time, so that what is computed of them stays in a processor's cache


class MSE(HistogramQuantizer):
    """Covers the range with the smallest mean squared error of rounding and clipping.

    Shares of the largest value are tried, first 8 % and then 1 % apart, from all of it down to
    where a smaller one can no longer be better. On an asymmetric grid the range shrinks on both
    sides first, then the ends are chosen in turn. Activations are taken to be spread evenly within
    each bin of the histogram; per channel (weights) the error is that of the very values.

    Sung et al. 2015, Resiliency of Deep Neural Networks under Quantization,
    https://arxiv.org/abs/1511.06488; Nagel et al. 2021, A White Paper on Neural Network
    Quantization, https://arxiv.org/abs/2106.08295, section 3.1.
    """

    def clip(self, seen: Histogram) -> tuple[float, float]:
        """The best range for the histogram."""

        def error(lo: Tensor, hi: Tensor) -> Tensor:
            return histogram_error(seen, self.grid, lo[:, 0], hi[:, 0])[:, None]

        low, high = best_range(error, torch.tensor([seen.lo]), torch.tensor([seen.hi]), self.grid)
        return float(low), float(high)

    def clip_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The best range for each row, by the values themselves."""
        lo, hi = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        return best_range(lambda lo, hi: rows_error(rows, self.grid, lo, hi), lo, hi, self.grid)


Error = Callable[[Tensor, Tensor], Tensor]
"""Takes the ends of candidate ranges, each of shape (candidates, rows), and gives their errors."""


def best_range(error: Error, lo: Tensor, hi: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range of smallest error among those within [lo, hi]; all of shape (rows,)."""
    below = above = best_share(lambda share: error(share * lo, share * hi), torch.ones_like(lo))
    if grid.symmetric or not bool(((lo < 0) & (hi > 0)).any()):
        return below * lo, above * hi

    def error_below(share: Tensor) -> Tensor:
        return error(share * lo, (above * hi).expand_as(share))

    def error_above(share: Tensor) -> Tensor:
        return error((below * lo).expand_as(share), share * hi)

    for _ in range(ROUNDS):
        below = best_share(error_below, below)
        above = best_share(error_above, above)
    return below * lo, above * hi


def best_share(error: Callable[[Tensor], Tensor], present: Tensor) -> Tensor:
    """The share of smallest error, at least as good as the `present` one, of shape (rows,).

    Smaller shares are tried until one costs twice as much as the best, which is no smaller:
    rounding costs it no more than the best, so that its clipping alone costs more than the best.
    """
    coarse, fine = COARSE.to(present)[:, None], FINE.to(present)[:, None]
    best, least = present, torch.full_like(present, torch.inf)
    shares = torch.cat([present[None], coarse.expand(-1, len(present))])
    while True:
        errors = error(shares)
        found, its_error = _smallest(shares, errors)
        best = torch.where(its_error < least, found, best)
        least = torch.minimum(its_error, least)
        smallest = shares[-1]
        if smallest[0] < NARROWEST or ((errors[-1] >= 2 * least) & (smallest <= best)).all():
            break
        shares = smallest * coarse * COARSE[1]
    shares = torch.cat([best[None], (fine * best).clamp(max=1)])
    return _smallest(shares, error(shares))[0]


def _smallest(shares: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the share of the smallest error, the first of equals, and that error."""
    index = errors.argmin(0, keepdim=True)
    return shares.gather(0, index)[0], errors.gather(0, index)[0]


def rows_error(rows: Tensor, grid: Grid, lo: Tensor, hi: Tensor) -> Tensor:
    """Sum of the squared errors of `rows`, shape (rows, n), for each of the candidate ranges."""
    scale, zero_point = grid.qparams(lo, hi)
    inverse = 1 / scale
    errors = torch.empty_like(scale)
    size = max(1, BLOCK // rows.shape[1])
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        some = rows[block]
        steps, whole = torch.empty_like(some), torch.empty_like(some)
        for i in range(len(scale)):
            torch.mul(some, inverse[i, block, None], out=steps)
            torch.round(steps, out=whole)
            if grid.symmetric:
                whole.clamp_(grid.qmin, grid.qmax)
            else:
                zero = zero_point[i, block, None]
                whole.clamp_(grid.qmin - zero, grid.qmax - zero)
            errors[i, block] = steps.sub_(whole).square_().sum(1)
    return errors * scale.square()


def histogram_error(seen: Histogram, grid: Grid, lo: Tensor, hi: Tensor) -> Tensor:
    """Sum of the squared errors of what `seen` counts, for candidate ranges of shape (candidates,).

    Values are taken to be spread evenly within their bin, of which only the part between the
    smallest and the largest value counts.
    """
    if grid.symmetric and grid.signed:
        counts, zero = seen.above + seen.below, 0
        smallest, largest = 0.0, max(-seen.lo, seen.hi)
    else:
        counts, zero = torch.cat([seen.below.flip(0), seen.above]), HALF
        smallest, largest = seen.lo, seen.hi
    edges = (torch.arange(len(counts) + 1, dtype=torch.float64) - zero) * seen.width
    if int((counts > 0).sum()) > ENOUGH:
        counts, edges = counts.view(-1, MERGED).sum(1), edges[::MERGED]
    edges, filled = edges.clamp(smallest, largest), counts > 0
    needed = torch.nn.functional.pad(filled, (0, 1)) | torch.nn.functional.pad(filled, (1, 0))
    start = (needed.cumsum(0) - 1)[:-1][filled]  # of each bin among the needed edges
    edges, counts = edges[needed], counts[filled]
    scale, zero_point = grid.qparams(lo, hi)
    step = scale.double()[:, None]
    low, high = (q - zero_point.double()[:, None] for q in (grid.qmin, grid.qmax))
    steps = edges / step
    whole = torch.maximum(torch.minimum(steps.round(), high), low)
    rest = steps.sub_(whole)
    # the integral of the squared error from 0 on; each whole step adds step**3 / 12
    integral = rest.square().mul_(rest).div_(3).add_(whole, alpha=1 / 12)
    spread = (integral[:, start + 1] - integral[:, start]) @ (counts / edges.diff()[start])
    return spread * step[:, 0] ** 3
