"""Weights are as important as they are large."""

from __future__ import annotations

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class L1(Criterion):
    """Scores a channel by the sum of its absolute weights.

    Li et al. 2017, Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710.
    """

    def score(self, layer: Layer) -> Tensor:
        """Absolute weight, same shape as the weight."""
        return layer.weight.abs()


class L2(Criterion):
    """Scores a channel by the sum of its squared weights.

    He et al. 2018, Soft Filter Pruning, https://arxiv.org/abs/1808.06866 (there the square root,
    which ranks alike).
    """

    def score(self, layer: Layer) -> Tensor:
        """Squared weight in float32, same shape as the weight."""
        return layer.weight.float().square()
