"""Match the teacher's features through a learned projection of the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimkit.builtin.losses.tensors import channels_last, same_shape
from slimkit.interfaces import DistillationLoss


class Hint(DistillationLoss):
    """Mean squared difference between the teacher's features and a projection of the student's.

    Romero et al. 2015, FitNets: Hints for Thin Deep Nets, https://arxiv.org/abs/1412.6550. The
    projection (their regressor) is a linear map of the channels, a 1x1 convolution, so that a
    student may have fewer than its teacher. It begins as the identity where both have the same
    number, and loses the input columns of channels that pruning cuts out.
    """

    student_channels: ClassVar[Mapping[str, int]] = {"projection.weight": 1}
    teacher_channels: ClassVar[Mapping[str, int]] = {"projection.weight": 0, "projection.bias": 0}

    def __init__(self) -> None:
        super().__init__()
        self.projection: nn.Linear | None = None

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        """Make the projection.

        Raises:
            ValueError: batch or positions differ.
        """
        s, t = channels_last(student), channels_last(teacher)
        same_shape(s[..., 0], t[..., 0], "name places of the same height and width")
        self.projection = nn.Linear(s.shape[-1], t.shape[-1], device=student.device)
        if s.shape[-1] == t.shape[-1]:
            with torch.no_grad():
                nn.init.eye_(self.projection.weight)
                nn.init.zeros_(self.projection.bias)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over all of the teacher's elements, in the feature's unit squared.

        Features (batch, channels), maps (batch, channels, *positions) or tokens
        (batch, length, channels).
        """
        assert self.projection is not None
        s, t = channels_last(student), channels_last(teacher)
        same_shape(s[..., 0], t[..., 0], "name places of the same height and width")
        with torch.autocast(student.device.type, enabled=False):
            return functional.mse_loss(self.projection(s), t)
