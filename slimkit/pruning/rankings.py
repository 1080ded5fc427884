"""In which order channels go: which groups are ranked against each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Literal

from torch import Tensor

from slimkit.pruning.coupling import Group

Ranking = Literal["global", "local", "isomorphic"]
Shapes = Mapping[str, tuple[int, ...]]
Removals = list[tuple[float, str]]
"""One entry for each channel that may go, in the order of going: the fraction that its pool has
lost when it is gone, and its group's name."""


def everything(group: Group, shapes: Shapes) -> Hashable:  # noqa: ARG001 one signature for all
    """All groups in one pool: the least important channels of the whole model go first."""
    return ""


def alone(group: Group, shapes: Shapes) -> Hashable:  # noqa: ARG001 one signature for all
    """Each group is its own pool: all lose the same fraction."""
    return group.name


def structure(group: Group, shapes: Shapes) -> Hashable:
    """Groups of the same structure share a pool, however many channels they have.

    Isomorphic Pruning for Vision Models (Fang et al., 2024): scores of layers that differ in kind
    cannot be compared, those of isomorphic parts can. Here two groups are isomorphic if they have
    as many tensors of each role, dimension, number of dimensions and kernel size.
    """
    return tuple(
        sorted((m.role, m.dim, len(shapes[m.tensor]), shapes[m.tensor][2:]) for m in group.members)
    )


RANKINGS: dict[str, Callable[[Group, Shapes], Hashable]] = {
    "global": everything,
    "local": alone,
    "isomorphic": structure,
}
"""What `ranking` may be: gives the pool in which a group is ranked."""


def removals(
    groups: Iterable[Group],
    pools: Mapping[str, Hashable],
    scores: Mapping[str, Tensor],
    removable: Mapping[str, int],
) -> Removals:
    """The channels that may go, such that all pools lose the same fraction at any time.

    Args:
        groups: which to rank.
        pools: group name to its pool.
        scores: group name to the importance of its channels, of shape (channels,).
        removable: group name to how many of its channels may go.
    """
    channels: dict[Hashable, int] = {}
    entries: dict[Hashable, list[tuple[float, str]]] = {}
    for group in groups:
        pool = pools[group.name]
        channels[pool] = channels.get(pool, 0) + group.channels
        least = scores[group.name].sort().values[: removable[group.name]].tolist()
        entries.setdefault(pool, []).extend((score, group.name) for score in least)
    return sorted(
        (gone / channels[pool], name)
        for pool, ranked in entries.items()
        for gone, (_, name) in enumerate(sorted(ranked), 1)
    )
