"""A weight is as important as the loss would change without it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class Taylor(Criterion):
    """Scores a weight by the squared first-order change of the loss when it is set to zero.

    Molchanov et al. 2019, Importance Estimation for Neural Network Pruning,
    https://arxiv.org/abs/1906.10771, equation 8. Needs labelled data.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def score(self, layer: Layer) -> Tensor:
        """(gradient * weight) squared, in float32: half precision would make it zero."""
        assert layer.gradient is not None
        return (layer.gradient.float() * layer.weight.float()).square()
