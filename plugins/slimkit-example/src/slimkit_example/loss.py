"""A distillation loss: a distance between two tensors."""

from __future__ import annotations

from torch import Tensor

from slimkit.interfaces import DistillationLoss


class FeatureL1(DistillationLoss):
    """Mean absolute difference of student and teacher, of equal shape."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar in the feature's own unit."""
        return (student - teacher).abs().mean()
