"""Match which samples of a batch activate the network alike."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from slimkit.builtin.losses.tensors import same_samples, unit
from slimkit.interfaces import DistillationLoss


class Similarity(DistillationLoss):
    """Mean squared difference of the similarity matrices of a batch, SPKD.

    Tung and Mori 2019, Similarity-Preserving Knowledge Distillation,
    https://arxiv.org/abs/1907.09682. A matrix holds the products of all pairs of samples, each row
    divided by its L2 norm; features of student and teacher may have any width.
    """

    compares_samples: ClassVar[bool] = True

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Squared difference over batch squared, without unit; features (batch, ...) of any shape.

        Raises:
            ValueError: batches differ or hold a single sample.
        """
        same_samples(student, teacher)
        return functional.mse_loss(_similarities(student), _similarities(teacher))


def _similarities(x: Tensor) -> Tensor:
    """Shape (batch, batch)."""
    flat = x.float().flatten(1)
    with torch.autocast(x.device.type, enabled=False):
        return unit(flat @ flat.T)
