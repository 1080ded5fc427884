"""Match the teacher's probability of each class by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import logits
from slimkit.interfaces import DistillationLoss


class BCELogits(DistillationLoss):
    """Divergence of each class's yes or no, for logits that a sigmoid turns into probabilities.

    Detectors and multi-label classifiers answer for each class by itself, where a softmax would
    lose how sure the teacher is. Yang et al. 2023, Bridging Cross-task Protocol Inconsistency for
    Distillation in Dense Object Detection, https://arxiv.org/abs/2308.14286. It is their binary
    cross-entropy less the teacher's own entropy, which is 0 where student and teacher agree and has
    the same gradient.

    Args:
        focus: exponent of the distance of both probabilities that weighs each answer, so that the
            many background places that are learnt already count little; 0 weighs all alike.
    """

    def __init__(self, *, focus: float = 0.0) -> None:
        super().__init__()
        if not focus >= 0:
            raise ValueError(f"focus must be at least 0, not {focus}")
        self.focus = focus

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over all elements in nats; logits of any equal shapes (batch, classes, ...).

        Raises:
            ValueError: the shapes differ.
        """
        logits(student, teacher)
        mine, theirs = student.float(), teacher.float()
        p = theirs.sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(theirs, p, reduction="none")
        apart = functional.binary_cross_entropy_with_logits(mine, p, reduction="none") - entropy
        if self.focus:
            with torch.no_grad():
                weight = (p - mine.sigmoid()).abs() ** self.focus
            apart = apart * weight
        return apart.mean()
