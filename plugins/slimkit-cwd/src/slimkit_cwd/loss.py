"""Match where each channel of a feature map looks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slimkit.interfaces import DistillationLoss


class CWD(DistillationLoss):
    """Divergence of each channel's distribution over positions from the teacher's.

    Made for dense prediction: segmentation, detection, keypoints. Each channel of both maps is
    softened to probabilities over its positions, so that what counts is where a channel is active
    and not how strongly. Shu et al. 2021, Channel-wise Knowledge Distillation for Dense Prediction
    (ICCV), https://arxiv.org/abs/2011.13256, equation 4. Their 1x1 convolution between different
    widths is left out: name a layer whose channels are protected, or the logits.

    Args:
        temperature: over 0; larger looks at more of the map. The loss is multiplied by its square.
    """

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be over 0, not {temperature}")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Divergence in nats times temperature squared, the mean over samples and channels.

        Args:
            student: shape (batch, channels, *positions), with one dimension of positions at least.
            teacher: the same shape.

        Raises:
            ValueError: the shapes differ, or there are no positions.
        """
        if student.shape != teacher.shape or student.dim() < 3:
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be maps "
                "of the same shape (batch, channels, height, width); protect this layer"
            )
        log_student, log_teacher = (
            functional.log_softmax(x.float().flatten(2) / self.temperature, dim=2)
            for x in (student, teacher)
        )
        divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
        # rounding can take a sum of next to nothing below zero
        return divergence.sum(2).clamp(min=0).mean() * self.temperature**2
