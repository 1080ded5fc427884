"""Match the teacher's boxes by their overlap."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimkit.builtin.losses.tensors import same_shape
from slimkit.interfaces import DistillationLoss


class Box(DistillationLoss):
    """One minus the generalised intersection over union of the student's and the teacher's boxes.

    The overlap as a distillation loss for any detector: Yang et al. 2023, Bridging Cross-task
    Protocol Inconsistency for Distillation in Dense Object Detection,
    https://arxiv.org/abs/2308.14286. Generalised, so that boxes that do not meet have a gradient
    too: Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630.

    Args:
        form: of a box: two corners, centre and size, or distances to the four sides from a point
            that student and teacher share (left, top, right, bottom).
        dim: dimension of the numbers of a box; the first four are the box.
        score: position along `dim` of what the teacher gives for how sure it is of each box, such
            as the objectness in YOLOX's rows; boxes are weighed by it, after a clamp to [0, 1].
            None weighs all alike.
    """

    when_equal: ClassVar[Literal["zero", "least", "any"]] = "any"  # boxes without an area

    def __init__(
        self,
        *,
        form: Literal["xyxy", "cxcywh", "ltrb"] = "xyxy",
        dim: int = -1,
        score: int | None = None,
    ) -> None:
        super().__init__()
        if score is not None and score < 4:
            raise ValueError(f"score must be 4 or more, behind the box, not {score}")
        self.form, self.dim, self.score = form, dim, score

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """From 0 to 2, the weighted mean over boxes, as (batch, boxes, 4 or more).

        Raises:
            ValueError: the shapes differ, or a box has too few numbers.
        """
        same_shape(student, teacher, "name places that give as many boxes")
        least = max(4, (self.score or 0) + 1)
        if not -student.dim() <= self.dim < student.dim() or student.shape[self.dim] < least:
            raise ValueError(
                f"dimension {self.dim} of {tuple(student.shape)} must hold {least} numbers a box"
            )
        s, t = (x.float().movedim(self.dim, -1) for x in (student, teacher))
        apart = 1 - overlap(*(_corners(x[..., :4], self.form) for x in (s, t)))
        if self.score is None:
            return apart.mean()
        weight = t[..., self.score].clamp(0, 1)
        return (apart * weight).sum() / weight.sum().clamp(min=1e-6)


def _corners(boxes: Tensor, form: str) -> Tensor:
    """Left, top, right and bottom."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if form == "cxcywh":
        return torch.cat([first - second / 2, first + second / 2], -1)
    return torch.cat([-first, second], -1) if form == "ltrb" else boxes


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of corners (..., 4), from -1 to 1."""
    eps = 1e-7
    sizes = [(x[..., 2:] - x[..., :2]).clamp(min=0) for x in (a, b)]
    both = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(
        0
    )
    shared = both.prod(-1)
    union = sizes[0].prod(-1) + sizes[1].prod(-1) - shared
    whole = around.prod(-1)
    return shared / (union + eps) - (whole - union) / (whole + eps)
