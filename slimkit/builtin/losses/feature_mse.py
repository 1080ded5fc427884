"""Match the teacher's features."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import same_shape
from slimkit.interfaces import DistillationLoss


class FeatureMSE(DistillationLoss):
    """Mean squared difference of two features of the same shape.

    Romero et al. 2015, FitNets, https://arxiv.org/abs/1412.6550, without their projection: where
    pruning changes the student's width, protect the layer or use ``hint``, which learns one.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over all elements, in the feature's unit squared.

        Raises:
            ValueError: the shapes differ.
        """
        way_out = "protect this layer from pruning, or use hint, which learns a projection"
        same_shape(student, teacher, way_out)
        return functional.mse_loss(student.float(), teacher.float())
