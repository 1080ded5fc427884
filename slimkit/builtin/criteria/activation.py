"""A channel is as important as what it puts out."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class Activations(Criterion):
    """Scores an output channel by its activations on data, behind batch-norm and activation.

    Args:
        statistic: ``mean``, the mean absolute value (Molchanov et al. 2017, Pruning Convolutional
            Neural Networks for Resource Efficient Inference, https://arxiv.org/abs/1611.06440); or
            ``apoz``, the fraction of values above zero, one minus the average percentage of zeros
            (Hu et al. 2016, Network Trimming, https://arxiv.org/abs/1607.03250).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"activation"})

    def __init__(self, *, statistic: Literal["mean", "apoz"] = "mean") -> None:
        self.statistic = statistic

    def score(self, layer: Layer) -> Tensor:
        """One number per output channel, shape (out, 1, ...)."""
        assert layer.activation is not None
        mean, zeros = layer.activation.mean, layer.activation.zeros
        score = mean if self.statistic == "mean" else 1 - zeros
        return score.reshape(-1, *[1] * (layer.weight.dim() - 1))
