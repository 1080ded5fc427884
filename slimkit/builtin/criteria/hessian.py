"""A weight is as important as the loss would rise without it, to second order."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class Hessian(Criterion):
    """Scores a weight by the second-order change of a trained network's loss without it.

    Half its squared value times the diagonal of the Hessian, for which the Fisher information
    stands. LeCun et al. 1990, Optimal Brain Damage; Theis et al. 2018, Faster gaze prediction with
    dense networks and Fisher pruning, https://arxiv.org/abs/1801.05787. Needs labelled data.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})

    def score(self, layer: Layer) -> Tensor:
        """Fisher information * weight squared / 2, in float32: half precision would give zero."""
        assert layer.fisher is not None
        return layer.fisher.float() * layer.weight.float().square() / 2
