"""Match the teacher's class probabilities."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import class_logits
from slimkit.interfaces import DistillationLoss


class KL(DistillationLoss):
    """Kullback-Leibler divergence from the teacher's softened class probabilities.

    Hinton et al. 2015, Distilling the Knowledge in a Neural Network,
    https://arxiv.org/abs/1503.02531. The result is multiplied by temperature squared, because
    softening divides its gradient by as much: the weight of the loss then means the same at any
    temperature.

    Args:
        temperature: over 0; larger shows more of the small probabilities.
    """

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be over 0, not {temperature}")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Divergence in nats times temperature squared; logits of shape (batch, classes, ...).

        Raises:
            ValueError: the shapes differ, or there is one class.
        """
        class_logits(student, teacher)
        log_student = functional.log_softmax(student.float() / self.temperature, dim=1)
        log_teacher = functional.log_softmax(teacher.float() / self.temperature, dim=1)
        divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
        return divergence.sum(1).mean() * self.temperature**2
