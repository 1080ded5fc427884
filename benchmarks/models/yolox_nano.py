"""YOLOX-Nano, a detector of the 80 classes of COCO, batch-norm folded into its convolutions.

Ge et al., "YOLOX: Exceeding YOLO Series in 2021", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.weights import loaded


class Conv(nn.Module):
    """Convolution and SiLU."""

    def __init__(self, inputs: int, outputs: int, k: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, k, stride, padding=k // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return functional.silu(self.conv(x))


class Separable(nn.Module):
    """A depthwise 3x3 convolution and a pointwise one."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = Conv(inputs, inputs, 3, stride, groups=inputs)
        self.pconv = Conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return self.pconv(self.dconv(x))


class Bottleneck(nn.Module):
    """A pointwise and a separable convolution, around which the input may be added again."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 1)
        self.conv2 = Separable(channels, channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        y = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class CSP(nn.Module):
    """`n` bottlenecks on half of the channels, the other half beside them.

    Wang et al., "CSPNet: A New Backbone that can Enhance Learning Capability of CNN", 2019.
    """

    def __init__(self, inputs: int, outputs: int, n: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = Conv(inputs, half, 1)
        self.conv2 = Conv(inputs, half, 1)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(n)))
        self.conv3 = Conv(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H, W)."""
        return self.conv3(torch.cat([self.m(self.conv1(x)), self.conv2(x)], 1))


class SPP(nn.Module):
    """The maxima of a neighbourhood in three sizes beside the input itself.

    He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks", 2014.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels // 2, 1)
        self.conv2 = Conv(channels * 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        x = self.conv1(x)
        pools = [functional.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13)]
        return self.conv2(torch.cat([x, *pools], 1))


class YoloxNano(nn.Module):
    """CSPDarknet, a feature pyramid down and up again, and one decoupled head for each stride."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        self.stem = Conv(12, 16, 3)
        self.dark2 = nn.Sequential(Separable(16, 32, 2), CSP(32, 32, 1, shortcut=True))
        self.dark3 = nn.Sequential(Separable(32, 64, 2), CSP(64, 64, 3, shortcut=True))
        self.dark4 = nn.Sequential(Separable(64, 128, 2), CSP(128, 128, 3, shortcut=True))
        self.dark5 = nn.Sequential(Separable(128, 256, 2), SPP(256), CSP(256, 256))

        self.lateral_conv0 = Conv(256, 128, 1)
        self.C3_p4 = CSP(256, 128)
        self.reduce_conv1 = Conv(128, 64, 1)
        self.C3_p3 = CSP(128, 64)
        self.bu_conv2 = Separable(64, 64, 2)
        self.C3_n3 = CSP(128, 128)
        self.bu_conv1 = Separable(128, 128, 2)
        self.C3_n4 = CSP(256, 256)

        self.stems = nn.ModuleList(Conv(width, 64, 1) for width in (64, 128, 256))
        self.cls_convs = nn.ModuleList(_two() for _ in range(3))
        self.reg_convs = nn.ModuleList(_two() for _ in range(3))
        self.cls_preds = nn.ModuleList(nn.Conv2d(64, classes, 1) for _ in range(3))
        self.reg_preds = nn.ModuleList(nn.Conv2d(64, 4, 1) for _ in range(3))
        self.obj_preds = nn.ModuleList(nn.Conv2d(64, 1, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 416, 416), BGR in 0..255, to (N, 3549, 5 + classes).

        A row is the box (x, y, w, h) before it is decoded, then the probabilities of an object
        and of each class; rows go through the strides 8, 16 and 32, and through an image by lines.
        """
        maps = self.pyramid(*self.backbone(x))
        return torch.cat([self.head(k, y).flatten(2) for k, y in enumerate(maps)], 2).mT

    def backbone(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features at strides 8, 16 and 32."""
        rows = [x[:, :, ::2], x[:, :, 1::2]]
        x = torch.cat([y[..., k::2] for k in (0, 1) for y in rows], 1)  # (N, 12, 208, 208)
        c3 = self.dark3(self.dark2(self.stem(x)))  # (N, 64, 52, 52)
        c4 = self.dark4(c3)  # (N, 128, 26, 26)
        return c3, c4, self.dark5(c4)  # the last (N, 256, 13, 13)

    def pyramid(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same three shapes, each having seen the others."""
        p5 = self.lateral_conv0(c5)  # (N, 128, 13, 13)
        p4 = self.reduce_conv1(self.C3_p4(torch.cat([_twice(p5), c4], 1)))  # (N, 64, 26, 26)
        n3 = self.C3_p3(torch.cat([_twice(p4), c3], 1))  # (N, 64, 52, 52)
        n4 = self.C3_n3(torch.cat([self.bu_conv2(n3), p4], 1))  # (N, 128, 26, 26)
        n5 = self.C3_n4(torch.cat([self.bu_conv1(n4), p5], 1))  # (N, 256, 13, 13)
        return n3, n4, n5

    def head(self, k: int, x: Tensor) -> Tensor:
        """The predictions (N, 5 + classes, H, W) from the k-th features."""
        x = self.stems[k](x)  # (N, 64, H, W)
        box = self.reg_convs[k](x)
        objects, classes = self.obj_preds[k](box), self.cls_preds[k](self.cls_convs[k](x))
        return torch.cat([self.reg_preds[k](box), objects.sigmoid(), classes.sigmoid()], 1)


def _two() -> nn.Sequential:
    return nn.Sequential(Separable(64, 64), Separable(64, 64))


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def pretrained(root: str | None = None) -> YoloxNano:
    """Return the detector: AP 0.305 on the 128 validation images."""
    return loaded(YoloxNano(), "coco_yolox_nano", root)


def prepare(pixels: Tensor) -> Tensor:
    """Return what the network takes, from BGR pixels (N, H, W, 3) uint8: (N, 3, H, W)."""
    return pixels.permute(0, 3, 1, 2).float()
