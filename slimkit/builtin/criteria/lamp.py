"""A weight is as important as it is among those of its layer that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class LAMP(Criterion):
    """Scores a weight by its square over the sum of squares of all weights at least as large.

    The largest weight of each layer scores one, so that layers can be ranked together. Lee et al.
    2021, Layer-adaptive sparsity for the magnitude-based pruning,
    https://arxiv.org/abs/2010.07611.
    """

    def score(self, layer: Layer) -> Tensor:
        """In [0, 1], same shape as the weight."""
        squares, order = layer.weight.double().square().flatten().sort(stable=True)
        rest = squares.flip(0).cumsum(0).flip(0)
        scores = torch.zeros_like(squares)
        scores[order] = squares / rest.clamp(min=torch.finfo(rest.dtype).tiny)
        return scores.reshape(layer.weight.shape)
