"""The cost of thousands of choices of sizes: what two choices share is counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from slimkit.pruning.cost import CostModel
from slimkit.pruning.counting import Counting, Removed
from slimkit.pruning.coupling import Group


class SizeCosts:
    """Predicts what `CostModel.predict` does, from the groups' sizes.

    Args:
        cost: of the dense model.
        groups: all of them; they share no position of a tensor.
        kept: group name and size to the channels that stay then.
        measure: ``flops`` or ``params``.
    """

    def __init__(
        self,
        cost: CostModel,
        groups: Sequence[Group],
        kept: Mapping[tuple[str, int], Tensor],
        measure: str,
    ) -> None:
        self.cost = cost
        self.which = ("flops", "params").index(measure)
        counting = {group.name: Counting([group]) for group in groups}
        self.removed: dict[tuple[str, int], Removed] = {
            (name, size): counting[name].removed({name: stay})
            for (name, size), stay in kept.items()
        }
        touching: dict[str, list[str]] = {name: [] for name in cost.shapes}
        for group in groups:
            for tensor in dict.fromkeys(m.tensor for m in group.members):
                if tensor in touching:
                    touching[tensor].append(group.name)
        self.tensors: dict[tuple[str, ...], list[str]] = {}
        for tensor, names in touching.items():
            self.tensors.setdefault(tuple(names), []).append(tensor)
        self._known: dict[tuple[tuple[str, ...], tuple[int, ...]], float] = {}

    def __call__(self, sizes: Mapping[str, int]) -> float:
        """Multiply-accumulates or parameters where every group has its size."""
        total = 0.0 if self.which else float(self.cost.fixed_macs)
        for names in self.tensors:
            key = names, tuple(sizes[name] for name in names)
            if key not in self._known:
                self._known[key] = self._counted(*key)
            total += self._known[key]
        return total

    def _counted(self, names: tuple[str, ...], sizes: tuple[int, ...]) -> float:
        """What the tensors cost that carry channels of just these groups."""
        gone = [self.removed[one] for one in zip(names, sizes, strict=True)]
        total = 0.0
        for tensor in self.tensors[names]:
            dims: dict[int, int] = {}
            for removed in gone:
                for d, count in removed.get(tensor, {}).items():
                    dims[d] = dims.get(d, 0) + count
            total += self.cost.share(tensor, dims)[self.which]
        return total
