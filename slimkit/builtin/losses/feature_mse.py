"""Match the teacher's features."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slimkit.interfaces import DistillationLoss


class FeatureMSE(DistillationLoss):
    """Mean squared difference of two features of the same shape.

    Romero et al. 2015, FitNets, https://arxiv.org/abs/1412.6550, without their projection: where
    pruning changed the student's width, name a layer whose channels are protected.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over all elements, in the feature's unit squared.

        Raises:
            ValueError: the shapes differ.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"student feature {tuple(student.shape)} and teacher feature "
                f"{tuple(teacher.shape)} differ in shape; protect this layer from pruning"
            )
        return functional.mse_loss(student.float(), teacher.float())
