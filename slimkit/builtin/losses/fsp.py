"""Match how features of one place turn into those of a later one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import same_shape
from slimkit.interfaces import DistillationLoss


class FSP(DistillationLoss):
    """Mean squared difference of the flow of solution procedure, a Gram matrix of two places.

    Yim et al. 2017, A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
    Transfer Learning,
    https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html.
    Each entry is the product of a channel of the first place and one of the second, averaged over
    positions; the larger map is max-pooled to the smaller one. Channels must be the teacher's.
    """

    places: ClassVar[int] = 2

    def forward(self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]  # of two places
        """Mean over batch and entries, in the product of both features' units.

        Args:
            student: maps (batch, channels, height, width) of an earlier and a later place.
            teacher: the same of the teacher.

        Raises:
            ValueError: these are no maps, or their channels differ.
        """
        s, t = _flow(*student), _flow(*teacher)
        same_shape(s, t, "protect both layers from pruning")
        return functional.mse_loss(s, t)


def _flow(first: Tensor, second: Tensor) -> Tensor:
    """Shape (batch, channels of the first, channels of the second)."""
    if first.dim() != 4 or second.dim() != 4:
        raise ValueError(
            f"both places must give maps (batch, channels, height, width), not "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    sizes = [min(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True)]
    a, b = (
        x.float() if [*x.shape[2:]] == sizes else functional.adaptive_max_pool2d(x.float(), sizes)
        for x in (first, second)
    )
    with torch.autocast(first.device.type, enabled=False):
        return a.flatten(2) @ b.flatten(2).transpose(1, 2) / (sizes[0] * sizes[1])
