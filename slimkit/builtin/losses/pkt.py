"""Match the probabilities that samples of a batch are neighbours."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import same_samples, unit
from slimkit.interfaces import DistillationLoss


class PKT(DistillationLoss):
    """Kullback-Leibler divergence of the neighbourhood of each sample.

    Passalis and Tefas 2018, Learning Deep Representations with Probabilistic Knowledge Transfer,
    https://arxiv.org/abs/1803.10837. The probability that one sample is another's neighbour is
    (1 + cosine) / 2, over the sum of these; features of student and teacher may have any width. A
    sample is its own neighbour too, as in the authors' code.
    """

    compares_samples: ClassVar[bool] = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over samples in nats; features (batch, ...) of any shape.

        Raises:
            ValueError: batches differ or hold a single sample.
        """
        same_samples(student, teacher)
        s, t = _neighbours(student), _neighbours(teacher)
        return functional.kl_div(s.log(), t.log(), reduction="batchmean", log_target=True)


def _neighbours(x: Tensor) -> Tensor:
    """Conditional probabilities, shape (batch, batch)."""
    directions = unit(x.float().flatten(1))
    with torch.autocast(x.device.type, enabled=False):
        near = ((1 + directions @ directions.T) / 2).clamp(min=1e-7)
    return near / near.sum(1, keepdim=True)
