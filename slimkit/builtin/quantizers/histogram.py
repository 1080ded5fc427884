"""Counts values in a histogram of constant size, for the quantizers that choose what to clip."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from slimkit.interfaces import Grid, Quantizer

HALF = 4096  # bins on either side of zero
NARROWEST = 2.0**-100  # a width whose reciprocal is a float32 as well
CHUNK = 2**17  # values at a time, so that what is computed of them stays in a processor's cache


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each bin on either side of zero; bins do not hold zero itself.

    Args:
        below: shape (HALF,), float64; bin k holds the values in [-(k + 1) width, -k width).
        above: shape (HALF,), float64; bin k holds the values in (k width, (k + 1) width].
        zeros: how many values are exactly zero.
        width: of a bin, in the tensor's units; a power of two.
        lo: the smallest value, at most 0.
        hi: the largest value, at least 0.
    """

    below: Tensor
    above: Tensor
    zeros: float
    width: float
    lo: float
    hi: float

    @property
    def total(self) -> float:
        """How many values there are."""
        return self.zeros + float(self.below.sum()) + float(self.above.sum())

    def magnitudes(self, grid: Grid) -> Tensor:
        """Counts by absolute value, which is all that a symmetric grid clips by, shape (HALF,).

        Without what an unsigned symmetric grid makes zero at any scale: the negative values.
        """
        return self.above + self.below if grid.signed else self.above


class HistogramQuantizer(Quantizer):
    """Chooses a range from the distribution of everything observed; a subclass says how.

    Values are counted in 4096 bins on either side of zero, whose width is a power of two and
    doubles when a larger value comes, so memory is constant and the result depends neither on the
    order nor on the size of the batches. A bin is 1/4096 to 1/2048 of the largest value wide.

    Per channel (the grids of weights) no histogram is kept: every tensor gets the range that suits
    it, and where several are observed, the range that holds all of theirs.
    """

    counts: Tensor
    width: Tensor
    lo: Tensor
    hi: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        if not grid.per_channel:
            self.register_buffer("counts", torch.zeros(2 * HALF + 1, dtype=torch.int64))
            self.register_buffer("width", torch.tensor(NARROWEST))
            self.register_buffer("lo", torch.zeros(()))
            self.register_buffer("hi", torch.zeros(()))
        self.register_buffer("low", torch.zeros(grid.channels))  # the chosen range
        self.register_buffer("high", torch.zeros(grid.channels))
        self._chosen = grid.per_channel
        self.register_load_state_dict_post_hook(_choose_again)

    @abstractmethod
    def clip(self, seen: Histogram) -> tuple[float, float]:
        """The smallest and the largest value to cover; `seen` holds at least one that is not 0."""

    def clip_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`clip` for each of `rows`, which are float32; (channels, n) to twice (channels,)."""
        ranges = [self._range(_histogram(row)) for row in rows]
        low, high = torch.tensor(ranges, dtype=torch.float32, device=rows.device).T
        return low, high

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Count the values of `x`; per channel, widen the range to what suits `x`.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        if not x.numel():
            return
        if self.grid.per_channel:
            low, high = self.clip_rows(self.grid.rows(x.float()))
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
            return
        lo, hi = _ends(x)
        old, new = float(self.width), fitting_width(max(-lo, hi))
        if new > old:
            self.counts.copy_(_merged(self.counts, min(int(new / old), HALF)))
            self.width.fill_(new)
        self.counts += counted(x, max(old, new), signed=lo < 0)
        self.lo.clamp_(max=lo)
        self.hi.clamp_(min=hi)
        self._chosen = False

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the chosen range."""
        if not self._chosen:
            seen = _split(self.counts, float(self.width), float(self.lo), float(self.hi))
            low, high = self._range(seen)
            self.low.fill_(low)
            self.high.fill_(high)
            self._chosen = True
        return self.grid.qparams(self.low, self.high)

    def _range(self, seen: Histogram) -> tuple[float, float]:
        """What `clip` says, but never more than was seen."""
        if seen.lo == seen.hi == 0:
            return 0.0, 0.0
        low, high = self.clip(seen)
        return max(seen.lo, low), min(seen.hi, high)


def fitting_width(largest: float) -> float:
    """The width of bins of which HALF hold values up to `largest`, a power of two."""
    fraction, exponent = math.frexp(largest)
    exponent -= fraction == 0.5  # a bin holds its outer end
    return max(math.ldexp(1.0, exponent) / HALF, NARROWEST) if largest else NARROWEST


def counted(x: Tensor, width: float, *, signed: bool = True) -> Tensor:
    """How many values of `x` are in each bin: HALF below zero, zero itself, HALF above; int64.

    Args:
        x: any shape and precision, with no absolute value over ``HALF * width``.
        width: of a bin, a power of two, so that multiplication by its reciprocal is exact.
        signed: whether there may be negative values.
    """
    flat = _flat(x)
    size = min(len(flat), CHUNK if x.device.type == "cpu" else 64 * CHUNK)
    places, signs = torch.empty(2, size, device=x.device)
    indices = torch.empty(size, device=x.device, dtype=torch.int32)
    counts = torch.zeros(2 * HALF + 1, device=x.device, dtype=torch.int64)
    for part in flat.split(size):
        place, index = places[: len(part)], indices[: len(part)]
        if part.dtype == torch.float32:
            torch.mul(part, 1 / width, out=place)
        else:
            place.copy_(part).mul_(1 / width)
        if signed:  # away from zero
            sign = torch.sign(place, out=signs[: len(part)])
            place.abs_().ceil_().mul_(sign)
        else:
            place.ceil_()
        index.copy_(place.add_(HALF))
        counts += torch.bincount(index, minlength=2 * HALF + 1)
    return counts


def _flat(x: Tensor) -> Tensor:
    """The values of `x` in one dimension, in the order of memory, which needs no copy."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)


def _ends(x: Tensor) -> tuple[float, float]:
    lo, hi = torch.stack(x.aminmax()).float().tolist()
    if not math.isfinite(lo) or not math.isfinite(hi):
        raise ValueError("a tensor to observe holds NaN or infinity")
    return lo, hi


def _merged(counts: Tensor, factor: int) -> Tensor:
    """The counts in bins that are `factor`, a power of two, as wide."""
    merged, few = torch.zeros_like(counts), HALF // factor
    merged[HALF - few : HALF] = counts[:HALF].view(few, factor).sum(1)
    merged[HALF] = counts[HALF]
    merged[HALF + 1 : HALF + 1 + few] = counts[HALF + 1 :].view(few, factor).sum(1)
    return merged


def _split(counts: Tensor, width: float, lo: float, hi: float) -> Histogram:
    counts = counts.double().cpu()  # what follows is many small steps
    zeros = float(counts[HALF])
    return Histogram(counts[:HALF].flip(0), counts[HALF + 1 :], zeros, width, lo, hi)


def _histogram(x: Tensor) -> Histogram:
    """Of one tensor, as of a quantizer that has observed nothing else."""
    lo, hi = _ends(x)
    width = fitting_width(max(-lo, hi))
    return _split(counted(x, width, signed=lo < 0), width, min(lo, 0.0), max(hi, 0.0))


def _choose_again(quantizer: torch.nn.Module, _keys: object) -> None:
    """The saved counts may hold more than the range that was saved with them."""
    quantizer._chosen = quantizer.grid.per_channel  # type: ignore[union-attr]
