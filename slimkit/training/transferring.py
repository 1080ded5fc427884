"""Gives the batches of loaders as a training step gets them, on the CPU and without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.core.hooks import DataHooks
from pytorch_lightning.utilities import CombinedLoader

BEFORE, AFTER = "on_before_batch_transfer", "on_after_batch_transfer"
Hook = Callable[[Any, int], Any]


def hooks_of(data: Any, inner: pl.LightningModule | None = None) -> dict[str, Hook]:
    """The hooks that somebody overrides, by name.

    Of the data module's and the LightningModule's the former's count, as in Lightning.
    """
    found = {}
    for name in (BEFORE, AFTER):
        for owner in (data, inner):
            own = getattr(type(owner), name, None)
            if own is not None and own is not getattr(DataHooks, name):
                found[name] = getattr(owner, name)
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
        move: takes a batch to where it is computed with; left out, it stays.
    """

    def __init__(
        self,
        loader: Any,
        data: Any,
        inner: pl.LightningModule | None,
        *,
        in_turn: bool = False,
        move: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        if isinstance(loader, list | tuple | Mapping):
            loader = CombinedLoader(loader, "sequential" if in_turn else "max_size_cycle")
        self.loader, self.move = loader, move
        self.hooks = hooks_of(data, inner)

    def __iter__(self) -> Iterator[Any]:
        combined = isinstance(self.loader, CombinedLoader)
        for one in self.loader:
            batch = one[0] if combined else one  # beside its number and its loader's
            if BEFORE in self.hooks:
                batch = self.hooks[BEFORE](batch, 0)
            batch = self.move(batch)
            if AFTER in self.hooks:
                batch = self.hooks[AFTER](batch, 0)
            yield batch
