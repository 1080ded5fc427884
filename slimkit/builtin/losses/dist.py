"""Match how probabilities correlate, between classes and within them, not their values."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import class_logits, unit
from slimkit.interfaces import DistillationLoss


class DIST(DistillationLoss):
    """One minus Pearson's correlation, of each sample's classes and of each class's samples.

    Huang et al. 2022, Knowledge Distillation from A Stronger Teacher,
    https://arxiv.org/abs/2205.10536. A teacher that is far surer than the student can be is matched
    in its preferences, not in its confidence.

    Args:
        inter: factor of the correlation over the classes of a sample.
        intra: factor of the correlation over the batch's samples of a class.
        temperature: over 0; larger shows more of the small probabilities. Both factors are
            multiplied by its square.
        dim: of the classes: 1, or -1 for tokens (batch, length, classes), as language models give
            them.
    """

    def __init__(
        self,
        *,
        inter: float = 1.0,
        intra: float = 1.0,
        temperature: float = 1.0,
        dim: int = 1,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be over 0, not {temperature}")
        self.inter, self.intra, self.temperature, self.dim = inter, intra, temperature, dim

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """From 0 to 2 (inter + intra) temperature squared; logits (batch, classes, ...).

        Positions of a map count as samples.

        Raises:
            ValueError: the shapes differ, or there is one class.
        """
        student, teacher = class_logits(student, teacher, self.dim)
        p, q = (
            functional.softmax(x.float().movedim(1, -1).flatten(0, -2) / self.temperature, dim=1)
            for x in (student, teacher)
        )  # (samples, classes)
        apart = self.inter * (1 - _correlation(p, q)).mean()
        apart = apart + self.intra * (1 - _correlation(p.T, q.T)).mean()
        return apart * self.temperature**2


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's of each row, shape (rows,)."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (unit(x) * unit(y)).sum(1)
