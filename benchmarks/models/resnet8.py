"""ResNet-8 of MLPerf Tiny for CIFAR-10, narrow and wide, batch-norm folded into its convolutions.

Banbury et al., "MLPerf Tiny Benchmark", 2021; weights of github.com/mlcommons/tiny.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.padding import SamePad
from benchmarks.models.weights import loaded


class Conv(nn.Module):
    """A convolution under the name that the weights give it."""

    def __init__(self, inputs: int, outputs: int, k: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = SamePad(inputs, outputs, k, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return self.conv(x)


class Block(nn.Module):
    """Two convolutions and a shortcut, a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv(inputs, outputs, 3, stride)
        self.conv2 = Conv(outputs, outputs, 3)
        self.short = Conv(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.conv2(functional.relu(self.conv1(x)))
        return functional.relu(y + self.short(x))


class ResNet8(nn.Module):
    """Three residual blocks of `width`, twice and four times as many channels.

    Args:
        width: channels of the first block.
        classes: outputs of the linear classifier.
    """

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = Conv(3, width, 3)
        self.b1 = Block(width, width, stride=1)
        self.b2 = Block(width, 2 * width, stride=2)
        self.b3 = Block(2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) in 0..255 to logits (N, classes)."""
        x = functional.relu(self.stem(x))
        x = self.b3(self.b2(self.b1(x)))  # (N, 4 width, 8, 8)
        return self.fc(x.mean((2, 3)))


def pretrained(root: str | None = None) -> ResNet8:
    """Return the narrow network: 88.1 % on the 1,000 test images."""
    return loaded(ResNet8(16), "cifar10_resnet8", root)


def pretrained_wide(root: str | None = None) -> ResNet8:
    """Return the wide network: 91.5 % on the 1,000 test images."""
    return loaded(ResNet8(40), "cifar10_resnet8_wide", root)


def prepare(pixels: Tensor) -> Tensor:
    """Return what the network takes, from RGB pixels (N, 32, 32, 3) uint8: (N, 3, 32, 32)."""
    return pixels.permute(0, 3, 1, 2).float()
