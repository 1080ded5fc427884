"""A channel is as important as its batch-norm lets it be."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class BatchNormScale(Criterion):
    """Scores an output channel by the square of the gamma of the batch-norm behind its layer.

    Best after training that pushes gammas to zero. Liu et al. 2017, Learning Efficient
    Convolutional Networks through Network Slimming, https://arxiv.org/abs/1708.06519, order a
    layer's channels by the absolute gamma. The square orders them alike, and is what adds up over
    coupled layers: the variance that batch-norm gives the channel in each of them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norm_scale"})

    def score(self, layer: Layer) -> Tensor:
        """Gamma squared, shape (out, 1, ...)."""
        assert layer.norm_scale is not None
        return layer.norm_scale.square().reshape(-1, *[1] * (layer.weight.dim() - 1))
