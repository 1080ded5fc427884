"""Compares what a deployed file computes with what the simulation computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimkit.decibels import decibels
from slimkit.errors import ExportError


@dataclass(frozen=True)
class Agreement:
    """How near two runs over the same inputs are.

    Args:
        top1: fraction of inputs with the same largest class; None where the first output is not
            of shape (batch, classes).
        sqnr_db: signal to quantization-noise ratio per output, in decibels; the signal is the
            simulation, infinite where both are equal to the last bit.
        largest_difference: the largest absolute difference over all outputs; infinite where one
            side is NaN or infinite and the other is not the same.
        close: fraction of values that differ by at most 1 % of their output's largest value.
        inputs: how many inputs were compared.
    """

    top1: float | None
    sqnr_db: tuple[float, ...]
    largest_difference: float
    close: float
    inputs: int

    @property
    def share(self) -> float:
        """One number from 0 to 1: `top1` where there are classes, else `close`."""
        return self.close if self.top1 is None else self.top1


def compare(simulated: Sequence[Tensor], deployed: Sequence[Tensor]) -> Agreement:
    """Compare outputs, each of shape (inputs, ...), in the same order.

    Raises:
        ExportError: two outputs differ in shape.

    >>> import torch
    >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> compare([a], [torch.tensor([[1.0, 0.0], [1.1, 1.0]])]).top1
    0.5
    """
    ratios, largest, near, values = [], 0.0, 0, 0
    for a, b in zip(simulated, deployed, strict=True):
        if a.shape != b.shape:
            raise ExportError(
                f"the simulation gives an output of shape {tuple(a.shape)} and the file one of "
                f"shape {tuple(b.shape)}: a file's shapes are fixed, so the model's must not "
                "change from call to call"
            )
        difference, signal = differences(a, b)
        ratios.append(decibels(signal, difference.square().sum().item()))
        if a.numel():
            largest = max(largest, difference.max().item())
            finite = a[a.isfinite()].double()
            bound = 0.01 * finite.abs().max() if finite.numel() else torch.tensor(0.0)
            near += int((difference <= bound).sum())
            values += a.numel()
    top1 = None
    first = simulated[0]
    if first.dim() == 2 and first.shape[1] > 1:
        agree = first.argmax(1) == deployed[0].argmax(1)
        top1 = agree.double().mean().item()
    return Agreement(top1, tuple(ratios), largest, near / max(1, values), len(first))


def differences(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """How far the values of `b` are from those of `a`, in float64, and the sum of squares of `a`.

    Equal infinities and NaN on both sides differ by 0; one of them alone by infinity.
    """
    x, y = a.double(), b.double()
    same = (x == y) | (x.isnan() & y.isnan())
    difference = (x - y).abs().nan_to_num(math.inf).masked_fill(same, 0.0)
    return difference, x[x.isfinite()].square().sum().item()
