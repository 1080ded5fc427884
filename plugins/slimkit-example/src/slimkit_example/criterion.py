"""A criterion: a function from weights to scores."""

from __future__ import annotations

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class FourthPower(Criterion):
    """Scores a weight by a power of its size, so that large weights count more than with L2.

    Args:
        power: over 0.
    """

    def __init__(self, *, power: float = 4.0) -> None:
        if not power > 0:
            raise ValueError(f"power must be over 0, not {power}")
        self.power = power

    def score(self, layer: Layer) -> Tensor:
        """Absolute weight to the power, in float32, same shape as the weight."""
        return layer.weight.float().abs() ** self.power
