"""MobileNet v1 with a quarter of the channels, for 224x224 images of ImageNet.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", 2017; Google's weights, from Keras.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.padding import SamePad
from benchmarks.models.weights import loaded

WIDTHS = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class Conv(nn.Module):
    """Convolution, batch-norm, ReLU6."""

    def __init__(self, inputs: int, outputs: int, k: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = SamePad(inputs, outputs, k, stride, groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return functional.relu6(self.bn(self.conv(x)))


class MobileNetV1(nn.Module):
    """A convolution and thirteen pairs of a depthwise and a pointwise convolution."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = Conv(3, 8, 3, stride=2)
        inputs = (8, *WIDTHS[:-1])
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(Conv(i, i, 3, stride, groups=i), Conv(i, o, 1))
                for i, o, stride in zip(inputs, WIDTHS, STRIDES, strict=True)
            )
        )
        self.fc = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 224, 224) in -1..1 to logits (N, classes)."""
        x = self.blocks(self.conv1(x))  # (N, 256, 7, 7)
        return self.fc(x.mean((2, 3)))


def pretrained(root: str | None = None) -> MobileNetV1:
    """Return the network of width 0.25: 48.9 % top-1 on the NIPS 2017 images."""
    return loaded(MobileNetV1(), "imagenet_mobilenet_v1_025", root)


def prepare(pixels: Tensor) -> Tensor:
    """Return what the network takes, from RGB pixels (N, H, W, 3) uint8: (N, 3, H, W)."""
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1
