"""SqueezeNet 1.1 for 224x224 images of ImageNet.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", 2016; the weights
were stored as 16-bit floats.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.weights import loaded

MEAN = (104.0, 117.0, 123.0)  # blue, green, red


class Fire(nn.Module):
    """Few channels by a 1x1 convolution, then many by a 1x1 and a 3x3 side by side."""

    def __init__(self, inputs: int, few: int, many: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, few, 1)
        self.expand1x1 = nn.Conv2d(few, many, 1)
        self.expand3x3 = nn.Conv2d(few, many, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 2 many, H, W)."""
        x = functional.relu(self.squeeze(x))
        return functional.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


class SqueezeNet(nn.Module):
    """A convolution, eight fire modules, and a convolution that classifies."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        self.fire2 = Fire(64, 16, 64)
        self.fire3 = Fire(128, 16, 64)
        self.fire4 = Fire(128, 32, 128)
        self.fire5 = Fire(256, 32, 128)
        self.fire6 = Fire(256, 48, 192)
        self.fire7 = Fire(384, 48, 192)
        self.fire8 = Fire(384, 64, 256)
        self.fire9 = Fire(512, 64, 256)
        self.conv10 = nn.Conv2d(512, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 224, 224), BGR less the mean, to logits (N, classes)."""
        x = _pool(functional.relu(self.conv1(x)))  # (N, 64, 56, 56)
        x = _pool(self.fire3(self.fire2(x)))  # (N, 128, 28, 28)
        x = _pool(self.fire5(self.fire4(x)))  # (N, 256, 14, 14)
        x = self.fire9(self.fire8(self.fire7(self.fire6(x))))  # (N, 512, 14, 14)
        return functional.relu(self.conv10(x)).mean((2, 3))


def _pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=2, ceil_mode=True)


def pretrained(root: str | None = None) -> SqueezeNet:
    """Return the network: 47.3 % top-1 on the NIPS 2017 images."""
    return loaded(SqueezeNet(), "imagenet_squeezenet_1_1", root)


def prepare(pixels: Tensor) -> Tensor:
    """Return what the network takes, from RGB pixels (N, H, W, 3) uint8: (N, 3, H, W) BGR."""
    return (pixels.flip(3) - torch.tensor(MEAN)).permute(0, 3, 1, 2)
