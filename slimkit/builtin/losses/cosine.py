"""Match the direction of the teacher's features."""

from __future__ import annotations

from torch import Tensor

from slimkit.builtin.losses.tensors import channels_last, same_shape, unit
from slimkit.interfaces import DistillationLoss


class Cosine(DistillationLoss):
    """One minus the cosine between the student's and the teacher's channels at each position.

    The alignment of hidden states in Sanh et al. 2019, DistilBERT,
    https://arxiv.org/abs/1910.01108. How large features are does not count.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """From 0 to 2, the mean over batch and positions.

        Features (batch, channels), maps (batch, channels, *positions) or tokens
        (batch, length, channels).

        Raises:
            ValueError: the shapes differ.
        """
        way_out = "protect this layer from pruning, or use hint, which learns a projection"
        same_shape(student, teacher, way_out)
        s, t = channels_last(student), channels_last(teacher)
        return (1 - (unit(s) * unit(t)).sum(-1)).mean()
