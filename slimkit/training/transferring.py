"""Gives the batches of loaders as a training step gets them, on the CPU and without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.core.hooks import DataHooks
from pytorch_lightning.utilities import CombinedLoader

_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")


def hooks_of(data: Any, inner: pl.LightningModule | None) -> list[Callable[[Any, int], Any]]:
    """What happens to a batch on its way, in order: the hooks before and behind the transfer.

    Of the data module's and the LightningModule's hooks the former's count, as in Lightning.
    """
    found = []
    for name in _HOOKS:
        for owner in (data, inner):
            own = getattr(type(owner), name, None)
            if own is not None and own is not getattr(DataHooks, name):
                found.append(getattr(owner, name))
                break
    return found


class Transferred:
    """Batches of one loader, or of a list or dict of them, through the hooks for batches.

    Args:
        loader: what a data module gives.
        data: the data module; anything else has no hooks.
        inner: the LightningModule.
        in_turn: whether several loaders come one after the other, as in a validation, or side by
            side in one batch, as in a training.
    """

    def __init__(
        self, loader: Any, data: Any, inner: pl.LightningModule | None, in_turn: bool = False
    ) -> None:
        self.loader, self.in_turn = loader, in_turn
        self.hooks = hooks_of(data, inner)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches():
            for hook in self.hooks:
                batch = hook(batch, 0)
            yield batch

    def _batches(self) -> Iterator[Any]:
        several = isinstance(self.loader, list | tuple | Mapping | CombinedLoader)
        if not several:
            yield from self.loader
        elif self.in_turn or isinstance(self.loader, CombinedLoader):
            loader = self.loader
            combined = isinstance(loader, CombinedLoader)
            for batch, _, _ in iter(loader if combined else CombinedLoader(loader, "sequential")):
                yield batch
        else:
            for batch, _, _ in iter(CombinedLoader(self.loader, "max_size_cycle")):
                yield batch
