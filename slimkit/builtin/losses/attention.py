"""Match where the teacher's features are strong, whatever their channels are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import positions, unit
from slimkit.interfaces import DistillationLoss


class Attention(DistillationLoss):
    """Mean squared difference of normalised attention maps.

    Zagoruyko and Komodakis 2017, Paying More Attention to Attention,
    https://arxiv.org/abs/1612.03928. A map is the mean over channels of the features' absolute
    value to a power, divided by its own L2 norm; channels of student and teacher may differ.

    Args:
        power: over 0; larger looks at the strongest channels only.
    """

    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__()
        if not power > 0:
            raise ValueError(f"power must be over 0, not {power}")
        self.power = power

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over batch and positions; maps (batch, channels, *positions).

        Raises:
            ValueError: the positions differ.
        """
        positions(student, teacher)
        s, t = (
            unit(x.float().abs().pow(self.power).mean(1).flatten(1)) for x in (student, teacher)
        )  # (batch, positions)
        return functional.mse_loss(s, t)
