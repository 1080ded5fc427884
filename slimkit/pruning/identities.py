"""The identities of channels: which positions of which tensors are one and the same channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
"""One identity per position of a dimension."""

FIXED, ANY = 0, -1
"""A position that must stay; and one that stretches to whatever it meets (broadcasting)."""


class Identities:
    """Hands out identities, remembers which are tied together, and why some must stay."""

    def __init__(self) -> None:
        self.count = 1  # identities so far; 0 is FIXED
        self._left: list[Ids] = []
        self._right: list[Ids] = []
        self._frozen: list[tuple[Ids, str]] = []
        self._merged: dict[tuple[bytes, ...], tuple[Ids, list[Ids], str]] = {}

    def new(self, size: int) -> Ids:
        """`size` identities that nobody has yet."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def tie(self, a: Ids, b: Ids, why: str) -> Ids:
        """Make two dimensions one, position by position, and give the one that says more.

        A channel that meets a fixed position must stay, with `why` as the reason. Of two names of
        one channel the older is given, which is a parameter's rather than a buffer's.
        """
        if a is b or (len(a) == len(b) and np.array_equal(a, b)):
            return a
        if len(a) != len(b):
            self.freeze(a, why)
            self.freeze(b, why)
            return fixed(max(len(a), len(b)))
        both = (a != ANY) & (b != ANY)
        stuck_a, stuck_b = both & (b == FIXED), both & (a == FIXED)
        self.freeze(a[stuck_a], why)
        self.freeze(b[stuck_b], why)
        free = both & (a != FIXED) & (b != FIXED)
        self._left.append(a[free])
        self._right.append(b[free])
        return np.where(free, np.minimum(a, b), np.maximum(a, b))

    def tie_rows(self, rows: Ids, why: str) -> Ids:
        """Make all rows of a (n, size) array one, and give the first."""
        for row in rows[1:]:
            self.tie(rows[0], row, why)
        return rows[0]

    def merge(self, dims: Sequence[Ids], why: str) -> Ids:
        """One dimension made of several that all hold channels; `split` gives them back.

        The channels must stay, with `why` as the reason, if anything else happens to it.
        """
        key = tuple(dim.tobytes() for dim in dims)
        if key not in self._merged:
            self._merged[key] = self.new(math.prod(len(dim) for dim in dims)), list(dims), why
        return self._merged[key][0]

    def split(self, ids: Ids, sizes: Sequence[int]) -> list[Ids] | None:
        """The dimensions that were merged to `ids`; None if others were."""
        for merged, dims, _ in self._merged.values():
            if np.array_equal(merged, ids) and [len(dim) for dim in dims] == list(sizes):
                return dims
        return None

    def parts(self, ids: Ids) -> list[Ids]:
        """The dimensions that were merged to `ids`, merged ones among them too; or `ids` itself."""
        for merged, dims, _ in self._merged.values():
            if np.array_equal(merged, ids):
                return [part for dim in dims for part in self.parts(dim)]
        return [ids]

    def freeze(self, ids: Ids, why: str) -> None:
        """These channels must stay."""
        ids = ids[ids > FIXED]
        if ids.size:
            self._frozen.append((ids, why))

    def resolve(self) -> tuple[Ids, dict[int, str]]:
        """One representative per identity, and the reason of each representative that must stay.

        Connected components by pulling the smallest label along the ties and jumping over
        labels, all identities at once.
        """
        self._freeze_what_stayed_merged()
        labels = np.arange(self.count, dtype=np.int64)
        left = np.concatenate([*self._left, np.empty(0, np.int64)])
        right = np.concatenate([*self._right, np.empty(0, np.int64)])
        while True:
            low = np.minimum(labels[left], labels[right])
            changed = (labels[left] != low).any() or (labels[right] != low).any()
            if not changed:
                break
            # the labels themselves are pulled down too, or a chain would move one step a round
            for ends in (labels[left], labels[right], left, right):
                np.minimum.at(labels, ends, low)
            labels = labels[labels]
        reasons: dict[int, str] = {}
        for ids, why in self._frozen:
            for root in np.unique(labels[ids]).tolist():
                reasons.setdefault(root, why)
        return labels, reasons

    def _freeze_what_stayed_merged(self) -> None:
        for merged, dims, why in reversed(self._merged.values()):
            used = [*self._left, *self._right, *(ids for ids, _ in self._frozen)]
            if np.isin(merged, np.concatenate([*used, np.empty(0, np.int64)])).any():
                for dim in (merged, *dims):
                    self.freeze(dim, why)


def fixed(size: int) -> Ids:
    """Positions that must stay."""
    return np.zeros(size, dtype=np.int64)


def stretching(size: int) -> Ids:
    """Positions made by broadcasting."""
    return np.full(size, ANY, dtype=np.int64)


def is_free(ids: Ids) -> bool:
    """Whether any position is a channel that might go."""
    return bool((ids > FIXED).any())


def varies(ids: Sequence[Ids]) -> list[int]:
    """Which dimensions hold channels."""
    return [d for d, dim in enumerate(ids) if is_free(dim)]
