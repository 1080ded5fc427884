"""FastestDet, an anchor-free detector of the 80 classes of COCO on a ShuffleNet v2.

Architecture and key names are those of github.com/dog-qiuqiu/FastestDet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.weights import loaded


def _conv(inputs: int, outputs: int, k: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, k, stride, k // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def _depthwise(channels: int, k: int, stride: int = 1) -> list[nn.Module]:
    return _conv(channels, channels, k, stride, groups=channels)


class Shuffle(nn.Module):
    """A block of ShuffleNet v2: every second channel passes, the others are convolved.

    With stride 2 all channels go through both branches, which doubles them.

    Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", 2018.
    """

    def __init__(self, inputs: int, half: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.branch_main = nn.Sequential(
            *_conv(inputs, half, 1),
            nn.ReLU(),
            *_depthwise(half, 3, stride),
            *_conv(half, half, 1),
            nn.ReLU(),
        )
        if stride == 2:
            self.branch_proj = nn.Sequential(
                *_depthwise(inputs, 3, stride), *_conv(inputs, half, 1), nn.ReLU()
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, 2 half, H / stride, W / stride)."""
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        pairs = x.unflatten(1, (-1, 2)).transpose(1, 2)  # (N, 2, C / 2, H, W)
        even, odd = pairs.flatten(1, 2).chunk(2, 1)
        return torch.cat([even, self.branch_main(odd)], 1)


class Backbone(nn.Module):
    """ShuffleNet v2 with 48, 96 and 192 channels at strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*_conv(3, 24, 3, stride=2), nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stage2 = _stage(24, 24, 4)
        self.stage3 = _stage(48, 48, 8)
        self.stage4 = _stage(96, 96, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images (N, 3, H, W) to the features of the three stages."""
        c3 = self.stage2(self.maxpool(self.first_conv(x)))  # (N, 48, H / 8, W / 8)
        c4 = self.stage3(c3)  # (N, 96, H / 16, W / 16)
        return c3, c4, self.stage4(c4)  # the last (N, 192, H / 32, W / 32)


def _stage(inputs: int, half: int, n: int) -> nn.Sequential:
    rest = [Shuffle(half, half, 1) for _ in range(n - 1)]
    return nn.Sequential(Shuffle(inputs, half, 2), *rest)


class Conv1x1(nn.Module):
    """Pointwise convolution, batch-norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(*_conv(inputs, outputs, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W)."""
        return self.conv1x1(x)


class SPP(nn.Module):
    """One, two and three depthwise 5x5 convolutions side by side: three sizes of neighbourhood."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.Conv1x1 = Conv1x1(inputs, outputs)
        self.S1 = _row(outputs, 1)
        self.S2 = _row(outputs, 2)
        self.S3 = _row(outputs, 3)
        self.output = nn.Sequential(*_conv(3 * outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W)."""
        x = self.Conv1x1(x)
        y = torch.cat([self.S1(x), self.S2(x), self.S3(x)], 1)
        return functional.relu(x + self.output(y))


def _row(channels: int, n: int) -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(n) for m in (*_depthwise(channels, 5), nn.ReLU())))


class Branch(nn.Module):
    """A depthwise 5x5 and a pointwise convolution: one kind of prediction."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv5x5 = nn.Sequential(*_depthwise(inputs, 5), nn.ReLU(), *_conv(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W)."""
        return self.conv5x5(x)


class Head(nn.Module):
    """Whether there is an object, its box and its class, for each position."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv1x1 = Conv1x1(inputs, inputs)
        self.obj_layers = Branch(inputs, 1)
        self.reg_layers = Branch(inputs, 4)
        self.cls_layers = Branch(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 5 + classes, H, W)."""
        x = self.conv1x1(x)
        objects, classes = self.obj_layers(x).sigmoid(), self.cls_layers(x).softmax(1)
        return torch.cat([objects, self.reg_layers(x), classes], 1)


class FastestDet(nn.Module):
    """The features of three scales brought to stride 16, and one head."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.SPP = SPP(48 + 96 + 192, 96)
        self.detect_head = Head(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 352, 352), BGR in 0..1, to (N, 5 + classes, 22, 22).

        Channels: probability of an object, the box (x, y, w, h) before it is decoded, probability
        of each class.
        """
        c3, c4, c5 = self.backbone(x)
        c3 = functional.avg_pool2d(c3, 3, stride=2, padding=1)
        c5 = functional.interpolate(c5, scale_factor=2.0, mode="nearest")
        return self.detect_head(self.SPP(torch.cat([c3, c4, c5], 1)))  # from (N, 336, 22, 22)


def pretrained(root: str | None = None) -> FastestDet:
    """Return the detector: AP 0.153 on the 128 validation images."""
    return loaded(FastestDet(), "coco_fastestdet", root)


def prepare(pixels: Tensor) -> Tensor:
    """Return what the network takes, from BGR pixels (N, H, W, 3) uint8: (N, 3, H, W)."""
    return pixels.permute(0, 3, 1, 2) / 255
