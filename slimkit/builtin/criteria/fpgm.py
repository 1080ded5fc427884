"""A filter that others can stand in for matters little."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class FPGM(Criterion):
    """Scores an output channel by the sum of its filter's distances to all filters of the layer.

    The smallest lie nearest to the geometric median, which the others can replace. He et al. 2019,
    Filter Pruning via Geometric Median, https://arxiv.org/abs/1811.00250.
    """

    def score(self, layer: Layer) -> Tensor:
        """Sum of Euclidean distances, shape (out, 1, ...)."""
        filters = layer.weight.flatten(1).double()
        # as differences, and not by the faster matrix product, which rounds small distances away
        how = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(filters, filters, compute_mode=how).sum(1)
        return distances.reshape(-1, *[1] * (layer.weight.dim() - 1))
