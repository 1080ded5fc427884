"""Match where each channel of a map is strong: for segmentation and detection."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import positions, same_shape
from slimkit.interfaces import DistillationLoss


class CWD(DistillationLoss):
    """Kullback-Leibler divergence over the positions of each channel.

    Shu et al. 2021, Channel-wise Knowledge Distillation for Dense Prediction,
    https://arxiv.org/abs/2011.13256. Each channel of features or logits becomes a distribution
    over positions. The result is multiplied by temperature squared.

    Args:
        temperature: over 0; larger looks at a wider region.
    """

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be over 0, not {temperature}")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over batch and channels, in nats times temperature squared.

        Features or logits (batch, channels, *positions).

        Raises:
            ValueError: the shapes differ.
        """
        positions(student, teacher)
        same_shape(student, teacher, "protect this layer from pruning, or compare the logits")
        log_s, log_t = (
            functional.log_softmax(x.float().flatten(2) / self.temperature, dim=2)
            for x in (student, teacher)
        )  # (batch, channels, positions)
        divergence = functional.kl_div(log_s, log_t, reduction="none", log_target=True)
        return divergence.sum(2).mean() * self.temperature**2
