"""Copies a module so that nothing of the copy reaches back into the original or its trainer."""

from __future__ import annotations

from typing import TypeVar

import pytorch_lightning as pl
from torch import nn

from slimkit.copies import copied

M = TypeVar("M", bound=nn.Module)


def own_copy(module: M) -> M:
    """A deep copy; a LightningModule's copy knows no trainer and looks its metrics up anew."""
    own = copied(module)
    for part in own.modules():
        if isinstance(part, pl.LightningModule):
            part.trainer = None
            part._metric_attributes = None  # a cache by identity, wrong for the copy
    return own
