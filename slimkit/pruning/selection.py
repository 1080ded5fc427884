"""Decides which channels stay so that the model meets a target."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.errors import PruningError, did_you_mean
from slimkit.pruning.allocation import allocate
from slimkit.pruning.cost import CostModel
from slimkit.pruning.counting import Counting
from slimkit.pruning.coupling import Coupling, Group
from slimkit.pruning.limits import Limits
from slimkit.pruning.rankings import RANKINGS, Removals, removals
from slimkit.pruning.removal import best, tensors_by_name
from slimkit.pruning.sensitivity import Curve
from slimkit.pruning.size_costs import SizeCosts
from slimkit.pruning.targets import COSTS, Target

FIRST = "the first layer is protected: all else is made of it (protect_first: false lets it go)"
ENOUGH = 2  # other groups, so that there is something to prune


@dataclass(frozen=True)
class Choice:
    """Which channels stay.

    Args:
        kept: group name to channel numbers, sorted, int64.
        macs: predicted multiply-accumulates.
        parameters: predicted parameters.
        size_mb: predicted MiB of parameters and buffers.
        carried: group name to the share of the dense group's importance that stays, 0 to 1.
    """

    kept: dict[str, Tensor]
    macs: float
    parameters: float
    size_mb: float
    carried: dict[str, float]


@dataclass(frozen=True)
class _Order:
    """A group's channels, the most important first, and how many live."""

    channels: Tensor
    living: int

    @classmethod
    def of(cls, scores: Tensor) -> _Order:
        order = torch.argsort(scores, descending=True, stable=True)
        return cls(order, max(1, int((scores >= 0).sum())))


class Selector:
    """Chooses channels of one model; measures it once and can then be asked many times.

    Args:
        model: the dense model.
        coupling: its verified groups.
        example_inputs: one batch of inputs, for the costs.
        round_to: kept channels are a multiple of this where the group is large enough; None: of
            `multiple`, or of half of it, a quarter ... in groups of less than two multiples.
        min_channels: no group gets smaller than this.
        ranking: ``global`` ranks all groups' channels together; with ``local`` all groups lose the
            same fraction; with ``isomorphic`` groups of the same structure are ranked together and
            every structure loses the same fraction.
        max_ratio: the largest fraction in [0, 1) that a group may lose, or the largest of the
            model's first group and of its last, with a straight line between; None: 0.95, or a
            target's ratio where that is more.
        ratios: name pattern of layers to the fraction in [0, 1) that their groups lose whatever
            the target; the first pattern that covers a group counts.
        multiple: what the runtime likes channel counts to be a multiple of.
        curves: how sensitive each group is; where given, they and no ranking share a cost out.
        protect_first: whether the group of the first convolution is spared where two others are
            left, and where a cost can be reached without it.

    Raises:
        PruningError: an option is out of its range, or a pattern covers no group.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        example_inputs: tuple[Any, ...],
        *,
        round_to: int | None = None,
        min_channels: int = 1,
        ranking: str = "global",
        max_ratio: float | Sequence[float] | None = None,
        ratios: Mapping[str, float] | None = None,
        multiple: int = 1,
        protect_first: bool = False,
        curves: Sequence[Curve] | None = None,
    ) -> None:
        if ranking not in RANKINGS:
            raise PruningError(f"no ranking is called {ranking!r}{did_you_mean(ranking, RANKINGS)}")
        self.coupling = coupling
        self.ranking = ranking
        self.curves = None if curves is None else _by_group(coupling, curves)
        self.limits = Limits.of(
            model,
            coupling,
            round_to=round_to,
            min_channels=min_channels,
            max_ratio=max_ratio,
            ratios=ratios,
            multiple=multiple,
        )
        first = {g.name for g in coupling.groups if g.first and g.name not in self.limits.given}
        enough = protect_first and len(coupling.groups) - len(first) >= ENOUGH
        self.spared = dict.fromkeys(first if enough else (), FIRST)
        self.shapes = {name: tuple(t.shape) for name, t in tensors_by_name(model).items()}
        self.cost = CostModel.of(model, example_inputs)
        self.counting = Counting(coupling.groups)
        self.dense_macs, self.dense_parameters = self.cost.predict({})
        self.dense_mb = self.cost.predict_size_mb({})

    def choose(
        self,
        scores: Mapping[str, Tensor],
        target: Target | None,
        *,
        progress: float = 1.0,
        carried: Mapping[str, float] | None = None,
    ) -> Choice:
        """Keep the best channels within the target.

        With ``flops``, ``params`` and ``size_mb`` channels go in the order of the ranking until
        the prediction is within the target. With ``ratio`` each group loses the same fraction;
        under the isomorphic ranking each structure does. With ``importance`` each group keeps the
        fewest channels that carry the share, whatever the ranking.

        Args:
            scores: group name to importance, of shape (channels,); below 0 for dead channels.
            target: None cuts the groups of `ratios` only.
            progress: in (0, 1], how far from the dense model to the goal; below 1 the target and
                the ratios are milder.
            carried: what an earlier choice carried; the channels that it gave up are dead.

        Raises:
            PruningError: the target is out of reach; it says the best reachable and what is in
                the way.
        """
        carried = carried or {}
        orders = {g.name: _Order.of(scores[g.name]) for g in self.coupling.groups}
        sizes = {g.name: self._size_before_ranking(g, progress) for g in self.coupling.groups}
        if target is not None:
            aim = target if progress == 1 else target.milder(progress, self._dense(target))
            free = self._free(aim, orders, sizes)
            if target.measure == "importance":
                sizes |= self._sizes_by_importance(free, scores, aim, carried)
            elif target.measure == "ratio":
                sizes |= self._sizes_by_ratio(free, scores, aim)
            elif self.curves is not None:
                sizes |= self._sizes_by_curves(free, self.curves, orders, aim, sizes)
            else:
                sizes |= self._sizes_by_cost(free, scores, orders, aim, sizes)
        kept = self._kept(orders, sizes)
        shares = {
            name: carried.get(name, 1.0) * share_of(scores[name], stay)
            for name, stay in kept.items()
        }
        removed = self.counting.removed(kept)
        return Choice(kept, *self.cost.predict(removed), self.cost.predict_size_mb(removed), shares)

    def prunable(self, target: Target | None) -> list[Group]:
        """The groups that may lose channels on the way to `target`, whatever their scores."""
        orders = {g.name: _Order.of(torch.ones(g.channels)) for g in self.coupling.groups}
        sizes = {g.name: self._size_before_ranking(g, 1.0) for g in self.coupling.groups}
        if target is not None:
            free = self._free(target, orders, sizes)
            sizes |= {g.name: self.limits.fewest(g, target) for g in free}
        return [g for g in self.coupling.groups if sizes[g.name] < g.channels]

    def left(self, target: Target | None) -> float:
        """The fraction that `target` leaves of what it measures; without one, that of `ratios`."""
        if target is None:
            return 1 - max(self.limits.given.values(), default=0.0)
        return target.left(self._dense(target))

    def _free(
        self, aim: Target, orders: Mapping[str, _Order], sizes: Mapping[str, int]
    ) -> list[Group]:
        """The groups that a ranking decides about."""
        ranked = [g for g in self.coupling.groups if g.name not in self.limits.given]
        free = [g for g in ranked if g.name not in self.spared]
        by_cost = aim.measure in COSTS and bool(self.spared)
        return ranked if by_cost and not self._suffices(free, orders, aim, sizes) else free

    def _dense(self, target: Target) -> float:
        """The dense model's figure in the unit of the target's value."""
        return self.dense_mb if target.measure == "size_mb" else 1.0

    def _size_before_ranking(self, group: Group, progress: float) -> int:
        if group.name in self.limits.given:
            return self.limits.given_size(group, progress)
        return group.channels

    def _sizes_by_importance(
        self,
        free: Sequence[Group],
        scores: Mapping[str, Tensor],
        aim: Target,
        carried: Mapping[str, float],
    ) -> dict[str, int]:
        """As many channels as carry the share of the dense group's importance."""
        sizes = {}
        for group in free:
            share = min(1.0, aim.value / carried.get(group.name, 1.0))
            enough = self.limits.rounded(group, carrying(scores[group.name], share), asked=True)
            sizes[group.name] = max(self.limits.fewest(group, aim), enough)
        return sizes

    def _sizes_by_ratio(
        self, free: Sequence[Group], scores: Mapping[str, Tensor], aim: Target
    ) -> dict[str, int]:
        """What is left when every group, or every structure, has lost the fraction."""
        largest = max(self.limits.max_ratio or (1.0,))
        if free and largest < aim.value:
            raise PruningError(
                f"target {aim} cannot be reached: max_ratio lets no group lose more than "
                f"{largest:g}. Lower the target or raise max_ratio"
            )
        ranking = "local" if self.ranking == "global" else self.ranking
        order = self._removals(free, scores, aim, ranking)
        gone = [name for lost, name in order if lost <= aim.value + 1e-9]
        return self._left(free, gone, asked=True)

    def _sizes_by_cost(
        self,
        free: Sequence[Group],
        scores: Mapping[str, Tensor],
        orders: Mapping[str, _Order],
        aim: Target,
        sizes: Mapping[str, int],
    ) -> dict[str, int]:
        """What is left after the first removals that bring the prediction within the target."""
        order = self._removals(free, scores, aim, self.ranking)
        # pools lose their channels in step: no cut between removals of the same fraction
        ends = [0, *(i for i, (a, b) in enumerate(pairwise(order), 1) if a[0] < b[0]), len(order)]

        def left(end: int) -> dict[str, int]:
            return self._left(free, [name for _, name in order[:end]])

        def cost(end: int) -> float:
            return self._cost(aim.measure, self._kept(orders, {**sizes, **left(end)}))

        limit = aim.value * self._whole(aim.measure)
        self._check_reachable(aim, cost(len(order)))
        # cost falls with every removed channel
        first = bisect_left(ends, True, hi=len(ends) - 1, key=lambda end: cost(end) <= limit)
        found = left(ends[first])
        if self.limits.round_to == 1 or not ends[first]:
            return found
        # a group that lost a whole multiple may have taken more than was asked: give some back
        last = {name: place for place, (_, name) in enumerate(order[: ends[first]])}
        for group in sorted(free, key=lambda g: last.get(g.name, -1), reverse=True):
            while found[group.name] < orders[group.name].living:
                more = self.limits.rounded(group, found[group.name] + 1)
                kept = self._kept(orders, {**sizes, **found, group.name: more})
                if self._cost(aim.measure, kept) > limit:
                    break
                found[group.name] = more
        return found

    def _check_reachable(self, aim: Target, smallest: float) -> None:
        """Refuse a target of cost that the smallest choice misses."""
        limit = aim.value * self._whole(aim.measure)
        if aim.measure == "size_mb" and limit >= self.dense_mb:
            raise PruningError(
                f"target {aim} is no target: the model has {self.dense_mb:.4g} MiB; the smallest "
                f"that can be reached is {smallest:.4g}"
            )
        if smallest > limit:
            raise PruningError(
                f"target {aim} cannot be reached: with everything removed that may go, "
                f"{self._said(aim.measure, smallest)} is left. "
                + self.limits.obstacles(self.coupling, aim)
            )

    def _sizes_by_curves(
        self,
        free: Sequence[Group],
        curves: Mapping[str, Curve],
        orders: Mapping[str, _Order],
        aim: Target,
        sizes: Mapping[str, int],
    ) -> dict[str, int]:
        """The sizes within the target at the least sum of the losses that the curves foresee."""
        limit = aim.value * self._whole(aim.measure)
        fewest = {g.name: self.limits.fewest(g, aim) for g in free}
        measured = {
            g.name: max(fewest[g.name], g.channels - curves[g.name].points[-1].removed)
            for g in free
        }
        self._check_reachable(aim, self._cost(aim.measure, self._kept(orders, {**sizes, **fewest})))
        if self._cost(aim.measure, self._kept(orders, {**sizes, **measured})) <= limit:
            fewest = measured  # no need to guess what lies behind the last ratio
        may = {g.name: {min(sizes[g.name], orders[g.name].living)} for g in self.coupling.groups}
        for group in free:
            living = orders[group.name].living
            upward = range(fewest[group.name], group.channels + 1)
            may[group.name] = {min(self.limits.rounded(group, n), living) for n in upward}
        kept = {
            (g.name, n): best(g, orders[g.name].channels, n)
            for g in self.coupling.groups
            for n in may[g.name]
        }
        cost = SizeCosts(self.cost, self.coupling.groups, kept, aim.measure)
        channels = {g.name: g.channels for g in self.coupling.groups}

        def loss(name: str, size: int) -> float:
            return curves[name].increase_at(channels[name] - size)

        return allocate(may, loss, cost, limit)

    def _suffices(
        self,
        free: Sequence[Group],
        orders: Mapping[str, _Order],
        aim: Target,
        sizes: Mapping[str, int],
    ) -> bool:
        """Whether the cost can be reached by these groups alone."""
        fewest = {g.name: self.limits.fewest(g, aim) for g in free}
        limit = aim.value * self._whole(aim.measure)
        return self._cost(aim.measure, self._kept(orders, {**sizes, **fewest})) <= limit

    def _whole(self, measure: str) -> float:
        """What a target's value is a fraction of; 1 where it is no fraction."""
        return {"flops": self.dense_macs, "params": self.dense_parameters}.get(measure, 1.0)

    def _said(self, measure: str, cost: float) -> str:
        if measure == "size_mb":
            return f"{cost:.4g} of {self.dense_mb:.4g} MiB"
        return f"{cost / self._whole(measure):.3f}"

    def _removals(
        self, free: Sequence[Group], scores: Mapping[str, Tensor], aim: Target, ranking: str
    ) -> Removals:
        pools = {g.name: RANKINGS[ranking](g, self.shapes) for g in free}
        removable = {g.name: g.channels - self.limits.fewest(g, aim) for g in free}
        return removals(free, pools, scores, removable)

    def _left(
        self, free: Sequence[Group], gone: Sequence[str], *, asked: bool = False
    ) -> dict[str, int]:
        count = Counter(gone)
        return {
            g.name: self.limits.rounded(g, g.channels - count[g.name], asked=asked) for g in free
        }

    def _kept(self, orders: Mapping[str, _Order], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return {
            g.name: best(g, orders[g.name].channels, min(sizes[g.name], orders[g.name].living))
            for g in self.coupling.groups
        }

    def _cost(self, measure: str, kept: Mapping[str, Tensor]) -> float:
        """The prediction for ``flops``, ``params`` or ``size_mb``."""
        removed = self.counting.removed(kept)
        if measure == "size_mb":
            return self.cost.predict_size_mb(removed)
        return self.cost.predict(removed)[0 if measure == "flops" else 1]


def _by_group(coupling: Coupling, curves: Sequence[Curve]) -> dict[str, Curve]:
    found = {curve.group: curve for curve in curves}
    for group in coupling.groups:
        if group.name not in found or found[group.name].channels != group.channels:
            raise PruningError(
                f"the sensitivity scan has no curve of {group.name} with {group.channels} "
                "channels: it is of another model; scan again"
            )
    return found


def carrying(scores: Tensor, share: float) -> int:
    """The fewest best channels whose scores make up a share (0 to 1) of the scores' sum.

    >>> carrying(torch.tensor([1.0, 6.0, 3.0]), 0.9)
    2
    """
    ordered = scores.clamp(min=0).sort(descending=True).values
    short = ordered.cumsum(0) < share * ordered.sum() * (1 - 1e-9)
    return min(len(scores), int(short.sum()) + 1)


def share_of(scores: Tensor, kept: Tensor) -> float:
    """What `kept` carries of the sum of the scores; 1 where there is none.

    >>> share_of(torch.tensor([1.0, 6.0, 3.0]), torch.tensor([1, 2]))
    0.9
    """
    living = scores.clamp(min=0)
    whole = living.sum().item()
    return living[kept].sum().item() / whole if whole > 0 else 1.0
