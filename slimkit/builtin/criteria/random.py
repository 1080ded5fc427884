"""The baseline that every other criterion must beat."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from slimkit.interfaces import Criterion, Layer


class Random(Criterion):
    """Scores each weight by a random number in (0, 1) that depends on seed and layer name only.

    Args:
        seed: the same seed gives the same scores.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def score(self, layer: Layer) -> Tensor:
        """Uniform noise, one number per output channel, shape (out, 1, ...)."""
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(layer.name.encode()))
        shape = (layer.weight.shape[0], *[1] * (layer.weight.dim() - 1))
        return torch.rand(shape, generator=generator).to(layer.weight.device)
