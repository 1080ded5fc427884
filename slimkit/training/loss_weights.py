"""What a loss weighs at a moment of the training."""

from __future__ import annotations

import math

from slimkit.recipe import Weight


def is_constant(weight: float | Weight) -> bool:
    """Whether it is the same throughout the training."""
    return not isinstance(weight, Weight) or weight.schedule == "constant"


def weight_at(weight: float | Weight, now: float) -> float:
    """The factor at a fraction of the training.

    Args:
        weight: of the recipe.
        now: from 0 to 1.

    >>> early = Weight(value=1.0, schedule="linear", to=0.2, during=(0.0, 0.5))
    >>> [round(weight_at(early, now), 3) for now in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.6, 0.2, 0.2]
    >>> warm = Weight(value=2.0, schedule="warm-up", during=(0.0, 0.1))
    >>> [weight_at(warm, now) for now in (0.0, 0.05, 0.1, 1.0)]
    [0.0, 1.0, 2.0, 2.0]
    """
    if not isinstance(weight, Weight):
        return weight
    begin, end = weight.during
    passed = float(now >= end)
    if begin < end:
        passed = min(1.0, max(0.0, (now - begin) / (end - begin)))
    first, last = weight.value, weight.to
    if weight.schedule == "warm-up":
        return first * passed
    if weight.schedule == "decay":
        return first * ((0.01 * first if last is None else last) / first) ** passed
    if weight.schedule == "cosine":
        passed = (1 - math.cos(math.pi * passed)) / 2
    return first if weight.schedule == "constant" else first + ((last or 0.0) - first) * passed
