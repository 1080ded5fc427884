"""Match the target's probability and those of the other classes, each with a weight of its own."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import logits
from slimkit.interfaces import DistillationLoss


class DKD(DistillationLoss):
    """Divergence of the target's probability and divergence among the other classes, apart.

    Zhao et al. 2022, Decoupled Knowledge Distillation, https://arxiv.org/abs/2203.08679. Hinton's
    divergence is the first plus the second times the teacher's probability of the other classes,
    which is small where the teacher is sure; here `beta` takes the place of that factor. Both are
    multiplied by temperature squared.

    Args:
        alpha: factor of the target's part.
        beta: factor of the other classes' part.
        temperature: over 0; larger shows more of the small probabilities.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be over 0, not {temperature}")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Tensor, teacher: Tensor, *, labels: Tensor) -> Tensor:  # type: ignore[override]  # with what `needs` names
        """Nats times temperature squared; logits (batch, classes), labels (batch,) of classes.

        Raises:
            ValueError: the shapes differ, or labels are not classes.
        """
        logits(student, teacher)
        if student.dim() != 2 or student.shape[1] < 2 or labels.shape != student.shape[:1]:
            raise ValueError(
                f"needs logits (batch, 2 classes or more) and one label a sample, not logits "
                f"{tuple(student.shape)} and labels {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= student.shape[1]:
            raise ValueError(f"labels must be whole numbers from 0 to {student.shape[1] - 1}")
        target = labels.long()[:, None]  # (batch, 1)
        parts = []
        for x in (student, teacher):
            log_p = functional.log_softmax(x.float() / self.temperature, dim=1)
            mine = log_p.gather(1, target)  # (batch, 1)
            others = log_p.scatter(1, target, float("-inf"))
            rest = others.logsumexp(1, keepdim=True)  # log of their probability together
            among = (others - rest).scatter(1, target, 0.0)
            parts.append((mine, rest, among))
        (s_mine, s_rest, s_among), (t_mine, t_rest, t_among) = parts
        of_target = t_mine.exp() * (t_mine - s_mine) + t_rest.exp() * (t_rest - s_rest)
        differences = t_among.exp() * (t_among - s_among)  # 0 at the target, where both are 0
        of_others = differences.sum(1)
        total = self.alpha * of_target.mean() + self.beta * of_others.mean()
        return total * self.temperature**2
