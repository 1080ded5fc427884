"""A model's forward, written down as a graph of ATen operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Written:
    """One forward of a model.

    Args:
        graph: its operations in order. Each node's ``meta["val"]`` has the shape of what it gives;
            ``meta["module"]`` is the dotted path of the module whose forward makes the call.
        state: the placeholders that are parameters and buffers, with their names (several where
            they are tied); in front of all operations.
        constants: the placeholders that are neither that nor inputs.
    """

    graph: fx.Graph
    state: dict[fx.Node, list[str]]
    constants: frozenset[fx.Node] = frozenset()

    def reads(self, names: Iterable[str]) -> bool:
        """Whether all these parameters and buffers are read."""
        unread = {name for node, held in self.state.items() if not node.users for name in held}
        return unread.isdisjoint(names)
