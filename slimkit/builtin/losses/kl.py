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
        dim: of the classes: 1, or -1 for tokens (batch, length, classes), as language models give
            them.
    """

    def __init__(self, *, temperature: float = 4.0, dim: int = 1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be over 0, not {temperature}")
        self.temperature, self.dim = temperature, dim

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Divergence in nats times temperature squared; logits (batch, classes, ...), or by `dim`.

        Raises:
            ValueError: the shapes differ, or there is one class.
        """
        student, teacher = class_logits(student, teacher, self.dim)
        log_student = functional.log_softmax(student.float() / self.temperature, dim=1)
        log_teacher = functional.log_softmax(teacher.float() / self.temperature, dim=1)
        divergence = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
        return divergence.sum(1).mean() * self.temperature**2
