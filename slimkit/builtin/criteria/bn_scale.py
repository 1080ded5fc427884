"""A channel is as important as its batch-norm lets it be."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class BatchNormScale(Criterion):
    """Scores an output channel by the absolute gamma of the batch-norm behind its layer.

    Best after training that pushes gammas to zero. Liu et al. 2017, Learning Efficient
    Convolutional Networks through Network Slimming, https://arxiv.org/abs/1708.06519.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norm_scale"})

    def score(self, layer: Layer) -> Tensor:
        """Absolute gamma, shape (out, 1, ...)."""
        assert layer.norm_scale is not None
        return layer.norm_scale.abs().reshape(-1, *[1] * (layer.weight.dim() - 1))
