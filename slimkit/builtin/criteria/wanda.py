"""A weight is as important as what it adds to its layer's output."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class Wanda(Criterion):
    """Scores a weight by its absolute value times the norm of the input feature that it reads.

    Sun et al. 2024, A Simple and Effective Pruning Approach for Large Language Models,
    https://arxiv.org/abs/2306.11695, equation 1. Needs data, without labels.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})

    def score(self, layer: Layer) -> Tensor:
        """|weight| * norm of its input, same shape as the weight."""
        assert layer.input_norm is not None
        return layer.weight.abs() * layer.input_norm
