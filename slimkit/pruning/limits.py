"""How small each group may get, and which groups lose a given fraction whatever their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from slimkit.errors import PruningError
from slimkit.pruning.coupling import Coupling, Group
from slimkit.pruning.patterns import check_pattern, covers
from slimkit.pruning.targets import Target

MOST_REMOVED = 0.95  # of one group: keeps a global ranking from emptying a layer


@dataclass(frozen=True)
class Limits:
    """The options that hold a ranking back, and those that overrule it.

    Args:
        round_to: kept channels are a multiple of this where the group is large enough.
        where_it_fits: whether groups of less than two multiples are rounded to half of it, or a
            quarter ..., such that they can still shrink: where a runtime asks and not the user.
        min_channels: no group gets smaller than this.
        max_ratio: the largest fraction that a group may lose, at the first and at the last group
            of the model; None: 0.95, or a target's ratio where that is more.
        depth: group name to its position in the model, 0 for the first group and 1 for the last.
        given: group name to the fraction that it loses whatever its scores.
    """

    round_to: int
    min_channels: int
    max_ratio: tuple[float, float] | None
    depth: Mapping[str, float]
    given: Mapping[str, float]
    where_it_fits: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        coupling: Coupling,
        *,
        round_to: int | None,
        min_channels: int,
        max_ratio: float | Sequence[float] | None,
        ratios: Mapping[str, float] | None,
        multiple: int = 1,
    ) -> Limits:
        """Check what a user wrote, and find the groups that `ratios` names.

        `multiple` is what a runtime asks for; it counts where the user says nothing.

        Raises:
            PruningError: a value out of its range, or a pattern that names no group.
        """
        whole = multiple if round_to is None else round_to
        for name, count in (("round_to", whole), ("min_channels", min_channels)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise PruningError(f"{name} must be a whole number of at least 1, not {count!r}")
        last = max(1, len(coupling.groups) - 1)
        depth = {group.name: i / last for i, group in enumerate(coupling.groups)}
        given = _given(model, coupling, ratios)
        ends = _both_ends(max_ratio)
        return cls(whole, min_channels, ends, depth, given, where_it_fits=round_to is None)

    def multiple(self, group: Group) -> int:
        """What the group's size is a multiple of."""
        multiple = self.round_to
        while self.where_it_fits and multiple > 1 and group.channels < 2 * multiple:
            multiple //= 2
        return multiple

    def rounded(self, group: Group, size: float, *, asked: bool = False) -> int:
        """The next multiple of `round_to`, at most the whole group.

        Args:
            group: whose channels.
            size: how many.
            asked: whether this size was asked for and not a cost; then a multiple that only a
                runtime asks for does not keep the group whole.
        """
        multiple = self.multiple(group)
        up = math.ceil(round(size, 6) / multiple) * multiple
        while self.where_it_fits and asked and multiple > 1 and up >= group.channels > size:
            multiple //= 2
            up = math.ceil(round(size, 6) / multiple) * multiple
        return min(group.channels, max(1, up))

    def fewest(self, group: Group, target: Target) -> int:
        """How many channels a ranking must leave."""
        if self.max_ratio is not None:
            shallow, deep = self.max_ratio
            least = _left(group, shallow + (deep - shallow) * self.depth[group.name])
        elif target.measure == "ratio":
            least = _left(group, max(MOST_REMOVED, target.value))
        else:
            # one channel more than 5 % of a multiple of 20, by float error; recipes rely on it
            least = math.ceil(group.channels * (1 - MOST_REMOVED))
        return self.rounded(group, min(max(self.min_channels, least), group.channels))

    def given_size(self, group: Group, progress: float) -> int:
        """How many channels `ratios` leaves of a group after `progress` (0 to 1) of the way."""
        left = _left(group, self.given[group.name] * progress)
        return self.rounded(group, max(self.min_channels, left), asked=True)

    def in_the_way(self, groups: Sequence[Group], target: Target) -> dict[str, str]:
        """The options without which one of `groups` could get smaller, and what to do to each."""
        shallow, deep = self.max_ratio or (MOST_REMOVED, MOST_REMOVED)
        largest = f"{shallow:g}" if shallow == deep else f"[{shallow:g}, {deep:g}]"
        without = {
            f"min_channels ({self.min_channels})": ("lower", replace(self, min_channels=1)),
            f"round_to ({self.round_to})": ("lower", replace(self, round_to=1)),
            f"max_ratio ({largest})": ("raise", replace(self, max_ratio=(1.0, 1.0))),
        }
        ranked = [g for g in groups if g.name not in self.given]
        found = {
            option: verb
            for option, (verb, other) in without.items()
            if any(other.fewest(g, target) < self.fewest(g, target) for g in ranked)
        }
        held = [g.name for g in groups if g.name in self.given]
        return found | ({f"ratios (of {', '.join(held[:5])})": "change"} if held else {})

    def obstacles(self, coupling: Coupling, target: Target) -> str:
        """Why no smaller model can be had: what was left whole, and the options to change."""
        whole = dict(coupling.frozen)
        for group in coupling.groups:
            given = group.name in self.given
            size = self.given_size(group, 1.0) if given else self.fewest(group, target)
            if size == group.channels:
                options = self.in_the_way([group], target) or ["round_to, min_channels"]
                whole[group.name] = f"held by {', '.join(options)}"
        some = "; ".join(f"{name}: {reason}" for name, reason in list(whole.items())[:5])
        listed = f"Left whole: {some}{' ...' if len(whole) > 5 else ''}. " if some else ""
        ways = self.in_the_way(coupling.groups, target).items()
        return f"{listed}Choose a milder target" + "".join(f", or {v} {way}" for way, v in ways)


def _left(group: Group, removed: float) -> int:
    """Channels that stay when a fraction goes: a whole number, rounded up."""
    return math.ceil(round(group.channels * (1 - removed), 6))


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _both_ends(max_ratio: float | Sequence[float] | None) -> tuple[float, float] | None:
    if max_ratio is None:
        return None
    ends = max_ratio if isinstance(max_ratio, list | tuple) else (max_ratio, max_ratio)
    if len(ends) != 2 or not all(_is_fraction(end) for end in ends):
        raise PruningError(
            "max_ratio must be a number from 0 to below 1, or two of them for the first and the "
            f"last group, such as [0.2, 0.6]; not {max_ratio!r}"
        )
    return float(ends[0]), float(ends[1])


def _given(
    model: nn.Module, coupling: Coupling, ratios: Mapping[str, float] | None
) -> dict[str, float]:
    """Group name to the fraction of the first pattern that covers one of its makers."""
    if not isinstance(ratios, Mapping | None):
        raise PruningError(f'ratios must be such as {{"layer1": 0.3}}, not {ratios!r}')
    given: dict[str, float] = {}
    for pattern, fraction in (ratios or {}).items():
        if not _is_fraction(fraction):
            raise PruningError(
                f"ratios: {pattern!r} must lose a fraction from 0 to below 1, not {fraction!r}"
            )
        check_pattern("ratios", str(pattern), model)
        groups = [g.name for g in coupling.groups if covers(pattern, g.makers)]
        if not groups:
            reasons = [f"{n}: {r}" for n, r in coupling.frozen.items() if covers(pattern, [n])]
            raise PruningError(
                f"ratios: no channels that {pattern!r} makes may go"
                + (f" ({'; '.join(reasons[:5])})" if reasons else "")
            )
        given = dict.fromkeys(groups, float(fraction)) | given
    return given
