"""Lets the random numbers of an epoch depend on seed and epoch only, for resumed runs.

Lightning's checkpoints hold no state of random generators. Here torch's, NumPy's and Python's are
seeded anew in front of each epoch, and so is a generator of the training loader's own; what draws
from any other generator goes on from its first number in a resumed run.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Generator

from slimkit.training.evaluation import muted


class Draws(pl.Callback):
    """Seeds every epoch.

    Args:
        seed: of the first epoch; each further one has the next.
        data: whose training loader is seeded as well.
        first: the epoch that this process begins with.
    """

    def __init__(self, seed: int, data: pl.LightningDataModule, first: int) -> None:
        self.seed = seed
        self.first = first
        self._base: int | None = None
        self._data = data
        self._made = data.train_dataloader
        data.train_dataloader = self._loader  # type: ignore[method-assign]
        self._seed(first)

    def leave(self) -> None:
        """Let loaders made from now on be the data module's own, wherever this process began."""
        self._data.train_dataloader = self._made  # type: ignore[method-assign]

    def on_train_epoch_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Seed before the loader begins anew; that of the first epoch has begun already."""
        if trainer.current_epoch > self.first:
            self._seed(trainer.current_epoch)
            self._seed_loader(trainer.train_dataloader, trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, _module: pl.LightningModule, _batch: Any, batch_idx: int
    ) -> None:
        """Seed again in front of the first step, whatever was drawn since."""
        if batch_idx == 0:
            self._seed(trainer.current_epoch)

    def _loader(self) -> Any:
        loader = self._made()
        if self.first:
            self._seed_loader(loader, self.first)
        return loader

    def _seed(self, epoch: int) -> None:
        with muted():
            pl.seed_everything(self.seed + epoch, workers=True, verbose=False)

    def _seed_loader(self, loader: Any, epoch: int) -> None:
        generator = getattr(loader, "generator", None)
        if isinstance(generator, Generator):
            if self._base is None:
                self._base = generator.initial_seed()
            generator.manual_seed(self._base + epoch)
