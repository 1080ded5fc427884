"""Small networks with what real ones are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Residual(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, width, bias=False), nn.BatchNorm2d(width)
        self.a, self.b, self.head = conv(width, width), conv(width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


class Depthwise(nn.Module):
    """Pads on two sides only, as TensorFlow does, and mixes ReLU6 and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.deep, self.wide = nn.Conv2d(16, 16, 3, stride=2, groups=16), nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = F.silu(self.deep(F.pad(x, (0, 1, 0, 1))))
        return self.head(F.relu6(self.wide(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(x)))


class Detector(nn.Module):
    """Boxes of up to hundreds and scores of up to 1 side by side, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.both = conv(3, 16), conv(16, 16, 1), conv(32, 16)
        self.boxes, self.scores = conv(16, 4, 1), conv(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.silu(self.stem(x))
        coarse = F.relu(self.mix(F.max_pool2d(fine, 2)))
        both = torch.cat([F.interpolate(coarse, scale_factor=2), fine], 1)
        x = F.silu(self.both(both))
        return torch.cat([100 * self.boxes(x), self.scores(x).sigmoid()], 1).flatten(2).mT


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(16, 16), conv(16, 16), conv(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([x, F.relu(self.b(x))], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        left, right = x.reshape(batch, channels, height, width).chunk(2, 1)
        return self.c(left) + right


class Clipped(nn.Module):
    """Reads one tensor both as it is and between bounds that are no integers of its grid."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(16, 16), conv(16, 16), conv(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) + self.c(x.clamp(-0.3, 0.5))
