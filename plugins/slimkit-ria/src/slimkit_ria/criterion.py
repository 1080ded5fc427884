"""A weight is as important as its share of what its output reads and of what its input feeds."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class RIA(Criterion):
    """Scores a weight by its shares of its row's and its column's sum, times its input's norm.

    Where weights times norms (wanda) give up a whole input whose weights are all small, a share
    cannot: every row and every column sums to one, so no channel is lost only because its layer is
    scaled small. Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for
    Large Language Models (ICLR), equations 3 and 4. Needs data, without labels. A convolution's
    row is one filter; its column is what reads one input channel at one position of the kernel.

    Args:
        power: of the input's norm, at least 0; 0 needs no more than the weights' shares.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})

    def __init__(self, *, power: float = 0.5) -> None:
        if not power >= 0:
            raise ValueError(f"power must be at least 0, not {power}")
        self.power = power

    def score(self, layer: Layer) -> Tensor:
        """Sum of both shares times the norm to the power, in float32, the weight's shape."""
        assert layer.input_norm is not None
        size = layer.weight.float().abs()  # (out, in, *kernel)
        tiny = 1e-38  # of a row or column of zeros, whose shares are zero
        of_row = size / size.flatten(1).sum(1).clamp(min=tiny).reshape(-1, *[1] * (size.dim() - 1))
        of_column = size / size.sum(0, keepdim=True).clamp(min=tiny)
        return (of_row + of_column) * layer.input_norm.float() ** self.power
