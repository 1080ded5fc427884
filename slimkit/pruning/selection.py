"""Decides which channels stay so that the model meets a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.errors import PruningError
from slimkit.pruning.cost import CostModel
from slimkit.pruning.coupling import Coupling, Group
from slimkit.pruning.removal import best, kept_positions

MEASURES = ("flops", "params", "ratio")
MOST_REMOVED = 0.95  # of one group: keeps a global ranking from emptying a layer


@dataclass(frozen=True)
class Target:
    """What a pruned model should cost.

    Args:
        measure: ``flops`` (multiply-accumulates left) or ``params`` (parameters left), both as a
            fraction of the dense model in (0, 1); or ``ratio``, the fraction of channels removed
            from every group.
        value: the fraction.
    """

    measure: str
    value: float

    @classmethod
    def of(cls, target: Mapping[str, float]) -> Target:
        """Read ``{"flops": 0.5}`` and its like.

        Raises:
            PruningError: not exactly one known measure, or a value outside (0, 1).
        """
        if not isinstance(target, Mapping):
            raise PruningError(f'target must be such as {{"flops": 0.5}}, not {target!r}')
        given = {name: value for name, value in target.items() if value is not None}
        if len(given) != 1 or next(iter(given)) not in MEASURES:
            raise PruningError(
                f"target must name exactly one of {', '.join(MEASURES)}, such as "
                f'{{"flops": 0.5}}; got {dict(target)!r}'
            )
        measure, value = next(iter(given.items()))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise PruningError(f"target.{measure} must be a number between 0 and 1, not {value!r}")
        return cls(measure, float(value))

    def milder(self, progress: float) -> Target:
        """The target after `progress` (0 to 1) of the way from the dense model."""
        if self.measure == "ratio":
            return Target(self.measure, self.value * progress)
        return Target(self.measure, 1 - (1 - self.value) * progress)


@dataclass(frozen=True)
class Choice:
    """Which channels stay.

    Args:
        kept: group name to channel numbers, sorted, int64.
        macs: predicted multiply-accumulates.
        parameters: predicted parameters.
    """

    kept: dict[str, Tensor]
    macs: float
    parameters: float


class Selector:
    """Chooses channels of one model; measures it once and can then be asked many times.

    Args:
        model: the dense model.
        coupling: its verified groups.
        example_inputs: one batch of inputs, for the costs.
        round_to: kept channels are a multiple of this where the group is large enough.
        min_channels: no group gets smaller than this.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        example_inputs: tuple[Any, ...],
        *,
        round_to: int = 1,
        min_channels: int = 1,
    ) -> None:
        self.coupling = coupling
        self.cost = CostModel.of(model, example_inputs)
        self.dense_macs, self.dense_parameters = self.cost.predict({})
        self.round_to = round_to
        self.min_channels = min_channels

    def choose(self, scores: Mapping[str, Tensor], target: Target) -> Choice:
        """Keep the best channels within the target.

        With ``flops`` and ``params`` all groups are ranked together and the least important
        channels go until the prediction is within the target; with ``ratio`` each group loses the
        same fraction.

        Raises:
            PruningError: even the smallest model is above the target; it says the best reachable.
        """
        if target.measure == "ratio":
            sizes = {
                g.name: self._rounded(g, max(self.min_channels, g.channels * (1 - target.value)))
                for g in self.coupling.groups
            }
            return self._choice(scores, sizes)
        limit = target.value * (
            self.dense_macs if target.measure == "flops" else self.dense_parameters
        )
        ranked = self._ranking(scores)

        def cost(removed: int) -> float:
            choice = self._choice(scores, self._sizes(ranked, removed))
            return choice.macs if target.measure == "flops" else choice.parameters

        if cost(len(ranked)) > limit:
            whole = self.dense_macs if target.measure == "flops" else self.dense_parameters
            raise PruningError(
                f"target {{{target.measure}: {target.value:g}}} cannot be reached: with everything "
                f"removed that may go, {cost(len(ranked)) / whole:.3f} is left. "
                + self._why_not_more()
            )
        low, high = 0, len(ranked)  # cost falls with every removed channel
        while low < high:
            middle = (low + high) // 2
            if cost(middle) <= limit:
                high = middle
            else:
                low = middle + 1
        return self._choice(scores, self._sizes(ranked, low))

    def _why_not_more(self) -> str:
        if not self.coupling.frozen:
            return "Raise the target or lower min_channels and round_to."
        some = list(self.coupling.frozen.items())[:5]
        listed = "; ".join(f"{name}: {reason}" for name, reason in some)
        return f"Left whole: {listed}" + (" ..." if len(self.coupling.frozen) > 5 else "")

    def _fewest(self, group: Group) -> int:
        least = max(self.min_channels, math.ceil(group.channels * (1 - MOST_REMOVED)), 1)
        return self._rounded(group, min(least, group.channels))

    def _rounded(self, group: Group, size: float) -> int:
        """The next multiple of `round_to`, at most the whole group."""
        up = math.ceil(round(size, 6) / self.round_to) * self.round_to
        return min(group.channels, max(1, up))

    def _ranking(self, scores: Mapping[str, Tensor]) -> list[str]:
        """Group names, one per channel that may go, least important channel first."""
        entries = []
        for group in self.coupling.groups:
            removable = group.channels - self._fewest(group)
            ordered = scores[group.name].sort().values[:removable].tolist()
            entries += [(score, group.name) for score in ordered]
        return [name for _, name in sorted(entries)]

    def _sizes(self, ranked: list[str], removed: int) -> dict[str, int]:
        gone: dict[str, int] = {}
        for name in ranked[:removed]:
            gone[name] = gone.get(name, 0) + 1
        return {
            g.name: self._rounded(g, g.channels - gone.get(g.name, 0)) for g in self.coupling.groups
        }

    def _choice(self, scores: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Choice:
        kept = {}
        for group in self.coupling.groups:
            order = torch.argsort(scores[group.name], descending=True, stable=True)
            kept[group.name] = best(group, order, sizes[group.name])
        positions = kept_positions((g, kept[g.name]) for g in self.coupling.groups)
        predicted_macs, predicted_parameters = self.cost.predict(positions)
        return Choice(kept, predicted_macs, predicted_parameters)
