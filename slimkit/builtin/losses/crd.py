"""Tell the teacher's features of the same sample from those of the other samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimkit.builtin.losses.tensors import channels_last, same_samples, unit
from slimkit.interfaces import DistillationLoss


class CRD(DistillationLoss):
    """Contrastive representation distillation, with the batch's other samples as negatives.

    Tian et al. 2020, Contrastive Representation Distillation, https://arxiv.org/abs/1910.10699. As
    there, a learned linear map takes each side's features, averaged over positions, to the unit
    sphere. Unlike there, negatives come from the batch and not from a memory of the whole data
    set, which asks for the samples' numbers: the loss is InfoNCE (van den Oord et al. 2018,
    https://arxiv.org/abs/1807.03748), from student to teacher and back. Use large batches.

    Args:
        dimensions: of the sphere.
        temperature: over 0; smaller looks at the nearest negatives only.
    """

    compares_samples: ClassVar[bool] = True
    when_equal: ClassVar[Literal["zero", "least", "any"]] = "any"  # as its linear maps are learned
    student_channels: ClassVar[Mapping[str, int]] = {"student.weight": 1}
    teacher_channels: ClassVar[Mapping[str, int]] = {"teacher.weight": 1}

    def __init__(self, *, dimensions: int = 128, temperature: float = 0.07) -> None:
        super().__init__()
        if dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, not {dimensions}")
        if not temperature > 0:
            raise ValueError(f"temperature must be over 0, not {temperature}")
        self.dimensions, self.temperature = dimensions, temperature
        self.student: nn.Linear | None = None
        self.teacher: nn.Linear | None = None

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        """Make both linear maps."""
        widths = [channels_last(x).shape[-1] for x in (student, teacher)]
        self.student, self.teacher = (
            nn.Linear(width, self.dimensions, device=student.device) for width in widths
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over samples in nats; the logarithm of the batch size where nothing is learnt yet.

        Features (batch, channels), maps (batch, channels, *positions) or tokens
        (batch, length, channels).

        Raises:
            ValueError: batches differ or hold a single sample.
        """
        same_samples(student, teacher)
        assert self.student is not None
        assert self.teacher is not None
        with torch.autocast(student.device.type, enabled=False):
            s, t = self.student(_pooled(student)), self.teacher(_pooled(teacher))
            near = unit(s) @ unit(t).T / self.temperature  # (batch, batch)
        own = torch.arange(len(near), device=near.device)
        return (functional.cross_entropy(near, own) + functional.cross_entropy(near.T, own)) / 2


def _pooled(x: Tensor) -> Tensor:
    """Mean over positions, shape (batch, channels)."""
    last = channels_last(x)
    return last.flatten(1, -2).mean(1) if last.dim() > 2 else last
