"""How large batch-norm's gammas are: what bn-scale regularization has brought about, or has not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BINS = 16


@dataclass(frozen=True)
class Gammas:
    """The absolute gammas of one batch-norm.

    Args:
        name: dotted path of the layer.
        channels: how many there are.
        least: the smallest.
        median: the middle one.
        most: the largest.
        small: fraction of them below a hundredth of the model's largest.
        counts: how many lie in each of `BINS` equal bins from 0 to the model's largest.
    """

    name: str
    channels: int
    least: float
    median: float
    most: float
    small: float
    counts: tuple[int, ...]


@torch.no_grad()
def gammas(model: nn.Module) -> list[Gammas]:
    """One record for each batch-norm with gammas, in the model's order; empty without one.

    >>> norm = nn.BatchNorm1d(4)
    >>> norm.weight.data = torch.tensor([0.0, 1.0, -2.0, 0.5])
    >>> [(g.channels, g.most, g.small) for g in gammas(norm)]
    [(4, 2.0, 0.25)]
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.affine}
    sizes = {name: norm.weight.detach().abs().float().cpu() for name, norm in norms.items()}
    largest = max((float(size.max()) for size in sizes.values()), default=0.0)
    return [_of(name, size, largest) for name, size in sizes.items()]


def _of(name: str, sizes: Tensor, largest: float) -> Gammas:
    counts = torch.histc(sizes, BINS, 0.0, largest or 1.0).long().tolist()
    small = float((sizes < largest / 100).float().mean()) if largest else 1.0
    middle = float(sizes.median())
    return Gammas(
        name, len(sizes), float(sizes.min()), middle, float(sizes.max()), small, (*counts,)
    )
