"""Match which places of an image look alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slimkit.interfaces import DistillationLoss


class PairWise(DistillationLoss):
    """Mean squared difference of the similarities between all pairs of places in a feature map.

    Made for dense prediction: segmentation, detection, depth. Places are squares of the map,
    averaged; two are as similar as the cosine of their features. Liu et al. 2019, Structured
    Knowledge Distillation for Semantic Segmentation (CVPR), https://arxiv.org/abs/1903.04197,
    equation 2. Student and teacher may have any width, before and after pruning.

    Args:
        patch: side of a place, in positions of the student's map; 1 compares all positions, and
            memory grows with their number squared.
    """

    def __init__(self, *, patch: int = 1) -> None:
        super().__init__()
        if patch < 1:
            raise ValueError(f"patch must be at least 1, not {patch}")
        self.patch = patch

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Without unit, from 0 to 4: the mean over samples and pairs of places.

        Args:
            student: shape (batch, channels, height, width).
            teacher: shape (batch, other channels, height, width).

        Raises:
            ValueError: these are no maps of the same height and width.
        """
        maps = student.dim() == teacher.dim() == 4
        if not maps or (len(student), student.shape[2:]) != (len(teacher), teacher.shape[2:]):
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be maps "
                "(batch, channels, height, width) that differ in channels only"
            )
        return functional.mse_loss(
            similarities(student, self.patch), similarities(teacher, self.patch)
        )


def similarities(x: Tensor, patch: int) -> Tensor:
    """Cosines between places, shape (batch, places, places), in float32."""
    with torch.autocast(x.device.type, enabled=False):
        places = functional.avg_pool2d(x.float(), patch, ceil_mode=True).flatten(2)
        # the largest value first: what is squared stays in range, and zeros stay zeros
        largest = places.abs().amax(1, keepdim=True).clamp(min=torch.finfo(places.dtype).tiny)
        unit = functional.normalize(places / largest, dim=1, eps=1e-6)
        return unit.transpose(1, 2) @ unit
