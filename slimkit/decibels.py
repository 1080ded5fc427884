"""Ratios of signal to noise."""

from __future__ import annotations

import math


def decibels(signal: float, noise: float) -> float:
    """The ratio of two sums of squares; infinite without noise.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf
