"""Small networks with the operations that TFLite computes in its own way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixed(nn.Module):
    """Residual, with pooling, concatenation, a depthwise layer, hard-swish, SiLU and a gate."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
        self.pointwise, self.branch = (
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.both, self.gate = nn.Conv2d(2 * width, width, 1), nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 10)
        x = F.avg_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.hardswish(self.pointwise(F.relu6(self.depthwise(x))))
        y = self.branch(F.max_pool2d(x, 3, 1, 1))
        x = self.both(torch.cat([F.relu(x + y), F.silu(y)], 1))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Strided(nn.Module):
    """A block whose two paths read the same tensor, one of them padded as TensorFlow pads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.short = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1, 2)
        self.long, self.head = nn.Conv2d(8, 16, 3, 2), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.long(F.pad(x, (0, 1, 0, 1))) + self.short(x)))


class Norm2d(nn.LayerNorm):
    """Normalizes over channels, which are moved to the end for it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """ConvNeXt's block: normalized with channels last, scaled, and added to what it read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep, self.norm = nn.Conv2d(width, width, 7, 1, 3), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return self.scale * y + x


class Padded(nn.Module):
    """Pads on two sides only, clips, and leaves through a layer, in the order of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.deep = nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 4, 4, 4)
        x = self.stem(F.pad(x, (0, 1, 0, 1))).clamp(-0.3, 0.5)
        x = F.relu(self.deep(F.pad(x, (0, 1, 0, 1))))
        return self.last(F.max_pool2d(x, 3, 2, 1))  # pads with what is less than any number


class Layers(nn.Module):
    """Nothing but layers and ReLU, which are computed to the last bit."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.c, self.head = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 10)
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.head(F.max_pool2d(x, 32).flatten(1))
