"""Measures what each group's channels are worth: the increase of the loss without some of them.

Sensitivity analysis as in Li et al., "Pruning Filters for Efficient ConvNets", 2017 (section 3.2),
but of whole coupled groups instead of single layers, on samples until the answer is clear instead
of on all of them, and without computing again what a group does not reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimkit.batches import Inputs, inputs_of, samples_in
from slimkit.errors import PruningError
from slimkit.evaluating import eagerly, evaluating, without_fast_paths
from slimkit.interfaces import tensors_of
from slimkit.progress import track
from slimkit.pruning.coupling import Coupling, Group
from slimkit.pruning.masks import Masks
from slimkit.pruning.removal import best, tensors_by_name
from slimkit.reuse import Reuse

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
PRECISION = 0.3
FEWEST = 192  # samples before a standard error is believed ...
FEWEST_BATCHES = 4  # ... and batches where a loss is known per batch only
SHARE, PLENTY = 0.1, 512  # of the data, where that is not more samples than this
OF_SPREAD = 0.5  # how much of the precision is asked of the small values of a curve


class Measure(Protocol):
    """What a point of the scan measures.

    Args:
        unit: what it is, for people.
    """

    unit: str

    def values(self, batch: Any) -> Any:
        """What the model makes of one batch."""

    def increase(self, dense: Any, values: Any) -> Tensor:
        """How much worse `values` are than the dense model's: (samples,), or () for a mean."""


class LossIncrease:
    """The loss minus the dense model's on the same samples, in the loss's own unit.

    Args:
        loss: takes a batch and gives the loss of each sample (samples,), or their mean ().
    """

    unit = "increase of the validation loss"

    def __init__(self, loss: Callable[[Any], Tensor]) -> None:
        self.loss = loss

    def values(self, batch: Any) -> Tensor:
        """The losses."""
        return self.loss(batch)

    def increase(self, dense: Tensor, values: Tensor) -> Tensor:
        """Their difference."""
        return values.double() - dense.double()


class Divergence:
    """Squared distance of the outputs from the dense model's over their squares; has no unit.

    Works for every model, without labels: 0 where nothing changes, 1 where nothing is left.

    Args:
        model: is called on the inputs of a batch.
        inputs: takes them out of it.
    """

    unit = "relative squared distance of the outputs"

    def __init__(self, model: nn.Module, inputs: Inputs = inputs_of) -> None:
        self.model = model
        self.inputs = inputs

    def values(self, batch: Any) -> list[Tensor]:
        """The outputs that are floating-point tensors."""
        out = self.model(*self.inputs(batch, self.model))
        return [t for t in tensors_of(out) if t.is_floating_point()]

    def increase(self, dense: list[Tensor], values: list[Tensor]) -> Tensor:
        """The mean over the outputs, of each sample where all have the same number of them."""
        rows = {t.shape[0] if t.dim() else 0 for t in dense}
        apart = len(rows) == 1 and 0 not in rows
        ratios = []
        for y, x in zip(dense, values, strict=True):
            y, x = (t.double().flatten(1 if apart and t.dim() > 1 else 0) for t in (y, x))
            if apart and y.dim() == 1:
                y, x = y[:, None], x[:, None]
            ratios.append((x - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12))
        return torch.stack(ratios).mean(0)


@dataclass(frozen=True)
class Point:
    """What a group's loss of some channels does.

    Args:
        ratio: fraction of the channels that was asked for.
        removed: how many channels that is.
        increase: mean over the samples, in the unit of the measure.
        error: its standard error; 0 where every sample was used.
        samples: how many were used.
    """

    ratio: float
    removed: int
    increase: float
    error: float
    samples: int


@dataclass(frozen=True)
class Curve:
    """How sensitive a group is.

    Args:
        group: its name.
        layers: the coupled layers that lose the same channels.
        channels: how many it has.
        points: by rising ratio.
        unit: what the increase is.
    """

    group: str
    layers: tuple[str, ...]
    channels: int
    points: tuple[Point, ...]
    unit: str = LossIncrease.unit

    def increase_at(self, removed: int) -> float:
        """The increase when so many channels go, 0 at none.

        The curve is made monotone (each point at least as high as those before it), and straight
        between its points. Behind the last one it goes on as steeply as it was anywhere.
        """
        x, y = [0], [0.0]
        for point in self.points:
            if point.removed > x[-1]:
                x.append(point.removed)
                y.append(max(y[-1], point.increase))
        slopes = [(y[i] - y[i - 1]) / (x[i] - x[i - 1]) for i in range(1, len(x))]
        for i in range(1, len(x)):
            if removed <= x[i]:
                return y[i] - slopes[i - 1] * (x[i] - removed)
        return y[-1] + max(slopes, default=0.0) * (removed - x[-1])


@dataclass
class Sums:
    """Running sums of the increases of one point.

    Args:
        count: observations: samples, or batches where a loss is known per batch only.
        weight: samples.
        total: sum of weighted increases.
        squares: sum of weighted squares.
        batches: how many batches they came from.
    """

    count: int = 0
    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    batches: int = 0

    @classmethod
    def of(cls, increases: Tensor, samples: int) -> Sums:
        """Those of one batch: (samples,), or () for the mean of as many."""
        if increases.dim():
            samples = 1
        values = increases.double()
        total, squares = samples * values.sum().item(), samples * values.square().sum().item()
        return cls(values.numel(), float(samples * values.numel()), total, squares, 1)

    def add(self, other: Sums) -> None:
        """Count the observations of another one too."""
        self.count += other.count
        self.weight += other.weight
        self.total += other.total
        self.squares += other.squares
        self.batches += other.batches

    @property
    def mean(self) -> float:
        """Of the increases."""
        return self.total / max(1.0, self.weight)

    def error(self, batches: int) -> float:
        """Standard error of the mean as an estimate for all of so many `batches`.

        They are drawn without replacement, so that it is 0 when all were seen (Cochran, "Sampling
        Techniques", 1977, section 2.6).
        """
        if self.batches >= batches:
            return 0.0
        if self.count < 2:
            return math.inf
        variance = max(0.0, self.squares / self.weight - self.mean**2)
        return math.sqrt(variance / (self.count - 1) * (1 - self.batches / batches))


Done = Callable[[int, str, Mapping[int, Sums]], None]
"""Takes a batch's number, a group, and what the batch adds for each number of channels."""


@dataclass
class _State:
    """Where the scan of one group stands."""

    group: Group
    order: Tensor
    sums: dict[int, Sums]  # by channels removed
    open: set[int]

    def close(self, precision: float, batches: int) -> int:
        """Take what is known well enough out of `open`; how many that are."""
        spread = max(abs(sums.mean) for sums in self.sums.values())
        known = set()
        for count in self.open:
            sums = self.sums[count]
            enough = sums.weight >= FEWEST and sums.count >= FEWEST_BATCHES
            enough &= sums.batches >= SHARE * batches or sums.weight >= PLENTY
            scale = max(abs(sums.mean), OF_SPREAD * spread)
            if precision and enough and sums.error(batches) <= precision * scale:
                known.add(count)
        self.open -= known
        return len(known)


def removed_at(group: Group, ratio: float) -> int:
    """How many channels a ratio takes: a whole number, rounded down, and one is left.

    >>> removed_at(Group("a", 16, ()), 0.3)
    4
    """
    return min(group.channels - 1, int(math.floor(round(group.channels * ratio, 6))))


def scan(
    model: nn.Module,
    coupling: Coupling,
    orders: Mapping[str, Tensor],
    batches: Any,
    measure: Measure,
    *,
    ratios: Sequence[float] = RATIOS,
    precision: float = PRECISION,
    known: Mapping[tuple[int, str], Mapping[int, Sums]] | None = None,
    done: Done = lambda *_: None,
) -> list[Curve]:
    """The curve of each group: what silencing its last channels costs, all else left as it is.

    Batches are used one after the other until a point's standard error is at most `precision` of
    its value, or of `OF_SPREAD` of the largest value on its curve. Each batch's part of the work
    is known by its number, so that a scan can go on where another one stopped.

    Args:
        model: the dense model; while this runs, its weights change, and come back.
        coupling: its groups.
        orders: group name to its channels (channels,), those to be kept longest first.
        batches: can be iterated over several times, in the same random order, and has a length.
        measure: what is measured.
        ratios: fractions of the channels in (0, 1), rising.
        precision: relative standard error at which a point is known; 0 uses all batches.
        known: what an earlier scan of the same things gave to `done`.
        done: called with each new result, to keep it.

    Raises:
        PruningError: there is no data, or the dense model's loss is not a finite number.
    """
    total = len(batches)
    if not total:
        raise PruningError("the validation data is empty: it gave no batch")
    states = []
    for group in coupling.groups:
        removed = sorted({removed_at(group, ratio) for ratio in ratios} - {0})
        sums = {count: Sums() for count in removed}
        states.append(_State(group, orders[group.name], sums, set(removed)))
    worker = _Worker(model, states, batches, measure)
    with evaluating(model), eagerly(model), without_fast_paths(), torch.no_grad():
        steps = _steps(worker, states, total, precision, known or {}, done)
        for _ in track(steps, "scanning", total=total * sum(len(s.sums) for s in states)):
            pass
    return [_curve(state, ratios, total, measure.unit) for state in states]


def _steps(
    worker: _Worker,
    states: Sequence[_State],
    total: int,
    precision: float,
    known: Mapping[tuple[int, str], Mapping[int, Sums]],
    done: Done,
) -> Iterator[None]:
    """Fill the sums; gives something for each point and batch that is done or need not be."""
    for number in range(total):
        for state in states:
            if not state.open:
                continue
            found = known.get((number, state.group.name), {})
            if not state.open <= set(found):
                found = worker.measured(number, state)
                done(number, state.group.name, found)
            for count in state.open:
                state.sums[count].add(found[count])
            yield from repeat(None, len(state.open))
            yield from repeat(None, state.close(precision, total) * (total - number - 1))


class _Worker:
    """Measures a group's points on one batch after the other."""

    def __init__(
        self, model: nn.Module, states: Sequence[_State], batches: Any, measure: Measure
    ) -> None:
        self.model, self.states, self.measure = model, states, measure
        self.batches = batches
        self.numbered: Iterator[tuple[int, Any]] | None = None
        self.number = -1
        self.batch: Any = None
        self.dense: Any = None
        self.reuse: Reuse | None = None
        self.tensors = tensors_by_name(model)

    def measured(self, number: int, state: _State) -> dict[int, Sums]:
        """What the batch adds for each number of channels that is still open."""
        self._load(number)
        assert self.reuse is not None
        samples = samples_in(self.batch)
        found = {}
        for count in sorted(state.open):
            with self._silenced(state, count):
                values = self.reuse.changed(state.group.name, self._run)
            increases = self.measure.increase(self.dense, values)
            if not torch.isfinite(increases).all():
                raise PruningError(
                    f"without {count} channels of {state.group.name} the {self.measure.unit} is "
                    "not a finite number on the validation data; protect the layer"
                )
            found[count] = Sums.of(increases, samples)
        return found

    def _run(self) -> Any:
        return self.measure.values(self.batch)

    def _load(self, number: int) -> None:
        """Take the batch, and the dense model's values on it."""
        if self.number == number:
            return
        if self.numbered is None:
            self.numbered = enumerate(self.batches)
        self.number, self.batch = next(one for one in self.numbered if one[0] == number)
        if self.reuse is None:
            self.reuse = self._planned()
        self.dense = self.reuse.unchanged(self._run)
        if not torch.isfinite(self.measure.increase(self.dense, self.dense)).all():
            raise PruningError(
                "the dense model's validation loss or output is not a finite number: scan a model "
                "that works"
            )

    def _planned(self) -> Reuse:
        """What each group's change leaves as it is; found, and tried, on few samples."""
        whole = self.batch
        changes = {s.group.name: {m.tensor for m in s.group.members} for s in self.states}
        try:
            self.batch = fewer(whole, samples_in(whole))
            reuse = Reuse(self.model, self._run, changes)
            dense = reuse.unchanged(self._run)
        except Exception:  # samples hang together in a way that nobody knows here
            self.batch = whole
            reuse = Reuse(self.model, self._run, changes)
            dense = reuse.unchanged(self._run)
        for state in self.states:
            with self._silenced(state, max(state.sums, default=0)):
                fast = reuse.changed(state.group.name, self._run)
                slow = self._run()
            a, b = (self.measure.increase(dense, values) for values in (fast, slow))
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
                reuse.distrust(state.group.name)
        self.batch = whole
        return reuse

    @contextmanager
    def _silenced(self, state: _State, count: int) -> Iterator[None]:
        """Inside, the last `count` channels of a group are zero in all its layers."""
        group = state.group
        names = {member.tensor for member in group.members}
        before = {name: self.tensors[name].clone() for name in names}
        kept = best(group, state.order, group.channels - count)
        Masks(Coupling((group,), {}), {group.name: kept}).apply_(self.model)
        try:
            yield
        finally:
            for name, values in before.items():
                self.tensors[name].copy_(values)


def fewer(batch: Any, samples: int, count: int = 2) -> Any:
    """The first samples of a batch of tensors, and of lists with an entry for each sample.

    >>> fewer((torch.zeros(8, 3), ["a"] * 8), 8)
    (tensor([[0., 0., 0.],
            [0., 0., 0.]]), ['a', 'a'])
    """
    if isinstance(batch, Tensor):
        return batch[:count] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: fewer(value, samples, count) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        if len(batch) == samples > count:
            return batch[:count]
        return type(batch)(fewer(value, samples, count) for value in batch)
    return batch


def _curve(state: _State, ratios: Sequence[float], total: int, unit: str) -> Curve:
    points = []
    for ratio in ratios:
        removed = removed_at(state.group, ratio)
        sums = state.sums.get(removed, Sums())
        error = sums.error(total) if removed else 0.0
        points.append(Point(ratio, removed, sums.mean, error, round(sums.weight)))
    group = state.group
    return Curve(group.name, tuple(group.layers), group.channels, tuple(points), unit)
