"""CIFAR-10 from lossless WebP sheets of 1,000 images, augmented a whole batch at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.folder import data_folder
from slimkit.errors import SlimkitError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SHEET = 1000  # images in a file, 25 rows of 40
TRAIN = 50_000  # training images that exist

Batch = tuple[Tensor, Tensor]


class Cifar10(LightningDataModule):
    """CIFAR-10 with the last training images held out for validation.

    A batch is ``(images, labels)``: normalised images (N, 3, 32, 32) float32 in channels-last
    memory, labels (N,) int64 in 0..9. The test part is the 1,000 test images of the data folder,
    of which one standard error of the accuracy is about 0.8 points.

    Args:
        root: the data folder, which holds ``cifar10/``; left out: the variable SLIMKIT_DATA.
        batch_size: images in a training batch; validation and test use twice as many.
        train_images: how many to train on, from the first on; left out: all but validation's.
        val_images: how many of the last training images to hold out.
        augment: move training images by up to 4 pixels and flip half of them.
        seed: decides the order of the training images and their augmentation.

    Raises:
        SlimkitError: if the data folder is missing or the parts overlap.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        train_images: int | None = None,
        val_images: int = 5_000,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = data_folder(root, "cifar10") / "cifar10"
        self.batch_size = batch_size
        self.train_images = TRAIN - val_images if train_images is None else train_images
        self.val_images = val_images
        self.augment = augment
        self.seed = seed
        if self.train_images + val_images > TRAIN:
            raise SlimkitError(
                f"Cifar10: train_images={self.train_images} and val_images={val_images} overlap; "
                f"there are {TRAIN} together"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training part, shuffled and augmented as the seed says."""
        images = Images(*self._read("train", 0, self.train_images))
        if self.augment:
            images.moves = torch.Generator().manual_seed(self.seed)
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            images, self.batch_size, shuffle=True, generator=order, collate_fn=_as_it_is
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the held-out training images, as they are."""
        images = Images(*self._read("train", TRAIN - self.val_images, TRAIN))
        return DataLoader(images, 2 * self.batch_size, collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the 1,000 test images."""
        images = Images(*self._read("test", 0, SHEET))
        return DataLoader(images, 2 * self.batch_size, collate_fn=_as_it_is)

    def _read(self, part: str, start: int, stop: int) -> Batch:
        """Images start to stop of a part (N, 32, 32, 3) and their labels (N,), both uint8."""
        first, last = start // SHEET, -(-stop // SHEET)
        sheets = [_sheet(self.folder / f"{part}_{i:02}.webp") for i in range(first, last)]
        images = torch.cat(sheets)[start - first * SHEET : stop - first * SHEET]
        with np.load(self.folder / "labels.npz") as labels:
            return images, torch.from_numpy(labels[part][start:stop])


class Images(Dataset[Batch]):
    """Images in memory that are fetched, augmented and normalised a batch at a time.

    Args:
        pixels: (N, 32, 32, 3) uint8.
        labels: (N,) uint8.
        moves: where augmentation draws from; None for none.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, moves: torch.Generator | None = None):
        self.pixels = pixels
        self.labels = labels
        self.moves = moves

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        # DataLoader calls this in place of __getitem__ and passes on what it returns.
        chosen = torch.tensor(indices)
        pixels = self.pixels[chosen]
        if self.moves is not None:
            pixels = crop_and_flip(pixels, self.moves)
        return normalise(pixels), self.labels[chosen].long()


def normalise(pixels: Tensor) -> Tensor:
    """Return what the models take, from pixels (N, H, W, 3) uint8: (N, 3, H, W) float32."""
    scale = 1 / (255 * torch.tensor(STD))
    shift = -torch.tensor(MEAN) / torch.tensor(STD)
    return torch.addcmul(shift, pixels.float(), scale).permute(0, 3, 1, 2)


def crop_and_flip(pixels: Tensor, moves: torch.Generator, border: int = 4) -> Tensor:
    """Return every image cut out of its zero-padded self at random, and half of them mirrored.

    Args:
        pixels: (N, H, W, C).
        moves: decides where and which.
        border: pixels of padding on each side.
    """
    n, height, width, _ = pixels.shape
    padded = functional.pad(pixels, (0, 0, border, border, border, border))
    top = torch.randint(2 * border + 1, (n, 1), generator=moves)
    left = torch.randint(2 * border + 1, (n, 1), generator=moves)
    mirrored = torch.rand(n, 1, generator=moves) < 0.5
    across = torch.arange(width)
    rows = top + torch.arange(height)  # (N, H)
    columns = left + torch.where(mirrored, across.flip(0), across)  # (N, W)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _sheet(file: Path) -> Tensor:
    """The 1,000 images of a sheet, (1000, 32, 32, 3) uint8."""
    with Image.open(file) as image:
        sheet = torch.from_numpy(np.array(image.convert("RGB")))  # (25 * 32, 40 * 32, 3)
    return sheet.view(25, 32, 40, 32, 3).transpose(1, 2).reshape(SHEET, 32, 32, 3)


def _as_it_is(batch: Batch) -> Batch:
    return batch
