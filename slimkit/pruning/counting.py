"""Counts what a choice of channels leaves of every tensor, without cutting it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from slimkit.pruning.coupling import Group

Removed = dict[str, dict[int, int]]
"""How many positions go: tensor path -> dimension -> positions."""


class Counting:
    """Counts for many choices in turn; all members of all groups at once.

    Args:
        groups: the groups, which share no position of a tensor.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = list(groups)
        ends = np.cumsum([0, *(group.channels for group in self.groups)])
        self._first = dict(zip((g.name for g in self.groups), ends.tolist(), strict=False))
        self._nobody = int(ends[-1])  # position -1: channels of another group
        self._places: list[tuple[str, int]] = []
        owners, starts = [np.empty(0, np.int64)], [0]
        for group in self.groups:
            for member in group.members:
                channel = member.channel.numpy()
                owners.append(
                    np.where(channel < 0, self._nobody, channel + self._first[group.name])
                )
                starts.append(starts[-1] + len(channel))
                self._places.append((member.tensor, member.dim))
        self._owners, self._starts = np.concatenate(owners), np.array(starts[:-1])

    def removed(self, kept: Mapping[str, Tensor]) -> Removed:
        """What goes where only `kept` (group name to channel numbers) stays; zeros are left out."""
        goes = np.ones(self._nobody + 1, dtype=np.int64)
        goes[-1] = 0
        for group in self.groups:
            goes[self._first[group.name] + kept[group.name].numpy()] = 0
        result: Removed = {}
        if not self._places:
            return result
        counts = np.add.reduceat(goes[self._owners], self._starts)
        for (tensor, dim), count in zip(self._places, counts.tolist(), strict=True):
            if count:
                dims = result.setdefault(tensor, {})
                dims[dim] = dims.get(dim, 0) + count
        return result
