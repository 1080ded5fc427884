"""Match distances and angles between the samples of a batch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import same_samples, unit
from slimkit.interfaces import DistillationLoss


class RKD(DistillationLoss):
    """Huber loss of the distances between two and the angles between three samples.

    Park et al. 2019, Relational Knowledge Distillation, https://arxiv.org/abs/1904.05068. Distances
    are divided by the batch's mean distance, so features may have any width and scale. Memory grows
    with the batch squared times the features: name pooled features or logits.

    Args:
        distance: factor of the distances.
        angle: factor of the angles; the paper's is twice that of the distances.
    """

    compares_samples: ClassVar[bool] = True

    def __init__(self, *, distance: float = 1.0, angle: float = 2.0) -> None:
        super().__init__()
        self.distance, self.angle = distance, angle

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over pairs and over triplets, without unit; features (batch, ...) of any shape.

        Raises:
            ValueError: batches differ or hold a single sample.
        """
        same_samples(student, teacher)
        s, t = (x.float().flatten(1) for x in (student, teacher))
        with torch.autocast(s.device.type, enabled=False):
            total = s.new_zeros(())
            if self.distance:
                apart = functional.smooth_l1_loss(_distances(s), _distances(t))
                total = total + self.distance * apart
            if self.angle:
                total = total + self.angle * functional.smooth_l1_loss(_angles(s), _angles(t))
        return total


def _distances(x: Tensor) -> Tensor:
    """Between all pairs over their mean, shape (batch, batch)."""
    squares = (x[:, None] - x[None]).square().sum(2)
    apart = squares > 0  # the root has no gradient at 0
    distances = torch.where(apart, squares, 1.0).sqrt() * apart
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=1e-12)


def _angles(x: Tensor) -> Tensor:
    """Cosine of the angle at each sample between all pairs of others, (batch, batch, batch)."""
    edges = unit(x[None] - x[:, None])  # from the first to the second
    return edges @ edges.transpose(1, 2)
