"""Whether a rewritten model still computes the same, and how far it is off where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.batches import fresh
from slimkit.calls import map_tensors
from slimkit.copies import copied
from slimkit.decibels import decibels
from slimkit.evaluating import evaluating, without_fast_paths
from slimkit.interfaces import tensors_of
from slimkit.rewriting.changes import Change, apply_

DOUBLE, SINGLE = 1e-10, 1e-4
"""What float rounding explains, of the largest value of an output, in float64 and float32."""


@torch.no_grad()
def difference(model: nn.Module, inputs: tuple[Any, ...], changes: Sequence[Change]) -> str:
    """How the outputs differ after `changes`; empty where float rounding explains it.

    Compared on the inputs and on noise in their place, in float64 where the model runs in it.

    Args:
        model: not changed.
        inputs: the forward's arguments.
        changes: what to apply to a copy.
    """
    for given in (inputs, _noise(inputs)):
        own, bound = _precise(model, given)
        args = tuple(map_tensors(_double, x) for x in given) if bound == DOUBLE else given
        before = outputs(own, args)
        if not before:
            return "the forward returns no tensor"
        apply_(own, changes)
        after = outputs(own, args)
        if [x.shape for x in before] != [x.shape for x in after]:
            return "the outputs have other shapes"
        for number, (x, y) in enumerate(zip(before, after, strict=True)):
            off, largest = _off(x, y)
            if not off <= bound * max(largest, 1e-30):
                return f"output {number} is off by {off:.3g}, its largest value is {largest:.3g}"
    return ""


@torch.no_grad()
def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a forward in evaluation mode gives."""
    with evaluating(model), without_fast_paths():
        return [x.clone() for x in tensors_of(model(*fresh(inputs)))]


class Noise:
    """Sums up how far outputs are from what they were, batch by batch."""

    def __init__(self) -> None:
        self._sums: list[list[float]] = []

    def add(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Take the outputs of one batch."""
        for number, (x, y) in enumerate(zip(before, after, strict=True)):
            if number == len(self._sums):
                self._sums.append([0.0, 0.0])
            self._sums[number][0] += x.double().square().sum().item()
            self._sums[number][1] += (x.double() - y.double()).square().sum().item()

    @property
    def sqnr_db(self) -> tuple[float, ...]:
        """Signal to noise ratio of each output, in decibels."""
        return tuple(decibels(*sums) for sums in self._sums)


def _precise(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, float]:
    """A copy that computes in float64, if it runs so, and the bound for it."""
    own = copied(model).double()
    try:
        found = outputs(own, tuple(map_tensors(_double, x) for x in inputs))
        if all(x.dtype == torch.float64 for x in found if x.is_floating_point()):
            return own, DOUBLE
    except Exception:  # a constant of the code is float32; in float32 the model does run
        pass
    return copied(model), SINGLE


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _noise(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Noise as large as the inputs; whole numbers stay."""
    generator = torch.Generator().manual_seed(0)

    def one(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        scale = x.std() if x.numel() > 1 and x.std() > 0 else torch.tensor(1.0)
        noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
        return noise * scale.to(x) + x.mean()

    return tuple(map_tensors(one, x) for x in inputs)


def _off(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The largest difference and the largest value; the same NaN and infinity differ by nothing."""
    a, b = x.double(), y.double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = (a - b).abs().nan_to_num(torch.inf).masked_fill(same, 0.0)
    finite = a[a.isfinite()].abs()
    return (
        gap.max().item() if gap.numel() else 0.0,
        finite.max().item() if finite.numel() else 0.0,
    )
