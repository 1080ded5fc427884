"""A user's module with a network and data that a recipe trains in seconds, as text."""

MODULE = """
import os, time
import torch
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def net(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )


class Slow(TensorDataset):
    def __getitem__(self, index):
        time.sleep(float(os.environ.get("SLEEP", "0")))
        return super().__getitem__(index)


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        labels = torch.arange(96) % 4
        images = torch.randn(96, 3, 8, 8, generator=g)
        images += 2 * torch.randn(4, 3, 1, 1, generator=g)[labels]
        self.train = Slow(images[:64], labels[:64])
        self.test = TensorDataset(images[64:], labels[64:])

    def train_dataloader(self):
        return DataLoader(self.train, 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.test, 32)
"""
