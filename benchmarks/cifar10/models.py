"""The CIFAR-10 residual networks of He et al. with parameter-free shortcuts, and their weights.

Architecture and key names are those of github.com/akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.folder import data_folder


class Block(nn.Module):
    """Two 3x3 convolutions around which the input is added again (shortcut option A).

    Where the block changes its shape, the shortcut takes every second pixel and puts as many
    channels of zeros before as after the input's.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.zeros = (outputs - inputs) // 2  # channels on either side

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.zeros:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.zeros, self.zeros))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """A residual network of depth 6 n + 2 for 32x32 images.

    He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2.

    Args:
        n: blocks in each of the three stages, of 16, 32 and 64 channels.
        classes: outputs of the linear classifier.
    """

    def __init__(self, n: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n, stride=1)
        self.layer2 = _stage(16, 32, n, stride=2)
        self.layer3 = _stage(32, 64, n, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, 3, 32, 32) to logits (N, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, 8, 8)
        return self.linear(x.mean((2, 3)))


def _stage(inputs: int, outputs: int, n: int, stride: int) -> nn.Sequential:
    rest = [Block(outputs, outputs) for _ in range(n - 1)]
    return nn.Sequential(Block(inputs, outputs, stride), *rest)


def resnet20(weights: str | None = None) -> ResNet:
    """Return a ResNet-20, untrained or with the weights of a safetensors file."""
    return _load(ResNet(3), weights)


def resnet56(weights: str | None = None) -> ResNet:
    """Return a ResNet-56, untrained or with the weights of a safetensors file."""
    return _load(ResNet(9), weights)


def pretrained_resnet20() -> ResNet:
    """Return the ResNet-20 of the data folder: 91.5 % on its 1,000 test images."""
    return resnet20(str(data_folder() / "weights/cifar10_resnet20.safetensors"))


def pretrained_resnet56() -> ResNet:
    """Return the ResNet-56 of the data folder: 92.6 % on its 1,000 test images."""
    return resnet56(str(data_folder() / "weights/cifar10_resnet56.safetensors"))


def _load(model: ResNet, weights: str | None) -> ResNet:
    if weights is not None:
        model.load_state_dict(load_file(weights))
    return model
