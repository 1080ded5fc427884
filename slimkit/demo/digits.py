"""A complete slimkit project in one file: handwritten digits and a small residual network.

Copy it to begin your own: a recipe needs one function that returns the data and one that returns
the model. ``recipe.yaml`` beside this file names both.
"""

from __future__ import annotations

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from slimkit.errors import SlimkitError


class Digits(LightningDataModule):
    """scikit-learn's 1,797 handwritten digits: 60 % to train, 20 % to validate, 20 % to test.

    A batch is ``(images, labels)``: images (N, 1, 8, 8) float32 in [0, 1], labels (N,) int64 in
    0..9. Every digit has the same share in each part.

    Args:
        batch_size: images in a training batch; validation and test use four times as many.
        seed: decides the split and the order of the training images.

    Raises:
        SlimkitError: if scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.train, self.val, self.test = _split(seed)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training part, shuffled anew each epoch in an order fixed by the seed."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation part, in a fixed order."""
        return DataLoader(self.val, 4 * self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test part, in a fixed order."""
        return DataLoader(self.test, 4 * self.batch_size)


def _split(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Train, validation and test part, stratified by digit."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise SlimkitError(
            "the demo's data needs scikit-learn: pip install 'slimkit[demo]'"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)  # (N, 1, 8, 8)
    labels = torch.tensor(digits.target, dtype=torch.int64)

    def divide(part: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        first, second = train_test_split(
            part.numpy(), test_size=fraction, stratify=labels[part].numpy(), random_state=seed
        )
        return torch.from_numpy(first), torch.from_numpy(second)

    train, rest = divide(torch.arange(len(labels)), 0.4)
    val, test = divide(rest, 0.5)
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[val], labels[val]),
        TensorDataset(images[test], labels[test]),
    )


class Block(nn.Module):
    """Two 3x3 convolutions around which the input is added again.

    The input passes a 1x1 projection where the block changes its width or its resolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for 8x8 images, two stages of two blocks each.

    Args:
        widths: channels of the two stages, at 8x8 and at 4x4.
        classes: outputs of the linear classifier.
    """

    def __init__(self, widths: tuple[int, int] = (64, 128), classes: int = 10) -> None:
        super().__init__()
        a, b = widths
        self.conv = nn.Conv2d(1, a, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(a)
        self.stage1 = nn.Sequential(Block(a, a), Block(a, a))
        self.stage2 = nn.Sequential(Block(a, b, stride=2), Block(b, b))
        self.fc = nn.Linear(b, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, classes)."""
        x = functional.relu(self.bn(self.conv(x)))
        x = self.stage2(self.stage1(x))  # (N, widths[1], 4, 4)
        return self.fc(x.mean((2, 3)))


def digits(batch_size: int = 64, seed: int = 0) -> Digits:
    """Return the data that the recipe names."""
    return Digits(batch_size, seed)


def resnet() -> ResNet:
    """Return the model that the recipe names, untrained; its weights follow torch's seed."""
    return ResNet()
