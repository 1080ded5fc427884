"""Proves on an example that a group can be removed, before anything is cut.

Two exact statements, in evaluation mode: zeroing a group's channels gives the same output as
removing them; and, where something is computed over all of them (a LayerNorm, a mean) and forbids
that, permuting the channels consistently in all coupled tensors leaves the output unchanged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.batches import doubled, fresh
from slimkit.calls import map_tensors
from slimkit.copies import copied
from slimkit.errors import in_one_line
from slimkit.interfaces import tensors_of
from slimkit.pruning.coupling import Coupling, Fit, Group, Member
from slimkit.pruning.removal import (
    best,
    fitted,
    kept_positions,
    remove_,
    rescale_,
    tensors_by_name,
)

MANY = 32  # channels, of which a random half can hardly be the right ones by chance
OTHERWISE = "removing its channels changes the output otherwise than zeroing them does"
NOT_A_NUMBER = "zeroing its channels gives NaN"


def verified(model: nn.Module, coupling: Coupling, inputs: tuple[Any, ...]) -> Coupling:
    """The same coupling without the groups that fail, each frozen with its reason.

    All groups are tried at once first, then the doubtful apart from the others; what fails is
    halved until the culprits are alone. A culprit is tried with the numbers of its modules changed
    (`Group.candidates`), and then together with others that such a number holds.
    """
    if not coupling.groups:
        return coupling
    frozen = dict(coupling.frozen)
    trial = Trial(model, inputs, training=coupling.training)
    search = _Search(trial)
    good = search.holding(coupling.groups)
    failed = [group for group in coupling.groups if group.name in search.reasons]
    good += search.holding_together(failed)
    order = {group.name: position for position, group in enumerate(coupling.groups)}
    good.sort(key=lambda group: order[group.name])
    for name in search.reasons:
        if name in order:
            frozen[name] = search.reasons[name]
    reason = trial.failure(good) if good and good != list(coupling.groups) else ""
    while reason and good:  # single groups hold but not all together: drop from the end
        frozen[good.pop().name] = f"together with other groups, {reason}"
        reason = trial.failure(good) if good else ""
    return replace(coupling, groups=tuple(good), frozen=frozen)


class _Search:
    """Finds the groups that can be removed, and what must be set in the user's modules for it.

    Args:
        trial: tells whether a set of groups can be removed.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.reasons: dict[str, str] = {}  # of the groups that fail
        self._learned: set[str] = set()  # kinds of numbers that had to follow before
        self._hopeless: set[tuple[str, ...]] = set()  # kinds of groups that none of them helped

    def holding(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that can be removed, in the same order; the others are in `reasons`."""
        reason = self.trial.failure(groups)
        if not reason:
            return list(groups)
        alike = self._as_learned(groups)
        if alike != list(groups) and not self.trial.failure(alike):
            return alike
        if len(groups) == 1:
            return self._holding_somehow(groups[0], reason)
        parts: list[Sequence[Group]]
        parts = [[g for g in groups if g.doubtful is doubt] for doubt in (False, True)]
        if not all(parts):
            middle = len(groups) // 2
            parts = [groups[:middle], groups[middle:]]
        good = {group.name: group for part in parts for group in self.holding(part)}
        return [good[group.name] for group in groups if group.name in good]

    def holding_together(self, failed: Sequence[Group]) -> list[Group]:
        """Those of the groups that failed that can be removed if they lose as much as others do.

        Queries and values of one attention, say, whose code knows one size of a head.
        """
        by_number: dict[tuple[Fit, int], list[Group]] = {}
        for group in failed:
            for fit in group.candidates:
                by_number.setdefault((fit, group.channels), []).append(group)
        joined: dict[tuple[str, ...], Group] = {}
        for groups in by_number.values():
            if len(groups) > 1:
                joined.setdefault(tuple(group.name for group in groups), _joined(groups))
        done: set[str] = set()
        wanted = []
        for names, group in sorted(joined.items(), key=lambda item: -len(item[0])):
            if done.isdisjoint(names):
                wanted.append((names, group))
                done.update(names)
        kept = {name: self.reasons[name] for names, _ in wanted for name in names}
        good = self.holding([group for _, group in wanted]) if wanted else []
        self.reasons |= kept  # the first reasons say more
        for names, group in wanted:
            if any(group.name == one.name for one in good):
                for name in names:
                    del self.reasons[name]
        return good

    def _holding_somehow(self, group: Group, reason: str) -> list[Group]:
        """The group with the first set of its candidates with which it can be removed."""
        by_kind: dict[str, list[Fit]] = {}
        for fit in group.candidates:
            by_kind.setdefault(_kind(fit), []).append(fit)
        alike = re.sub(r"\d+", "#", group.name), str(len(group.members)), *by_kind
        for kinds in () if alike in self._hopeless else _variants([*by_kind]):
            variant = replace(group, fits=tuple(fit for kind in kinds for fit in by_kind[kind]))
            if not self.trial.failure([variant]):
                for kind in kinds if len(kinds) > 1 else ():  # what is not needed is not touched
                    less = replace(variant, fits=tuple(f for f in variant.fits if _kind(f) != kind))
                    if less.fits and not self.trial.failure([less]):
                        variant = less
                self._learned.update(_kind(fit) for fit in variant.fits)
                return [variant]
        self._hopeless.add(alike)
        self.reasons[group.name] = reason
        return []

    def _as_learned(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with the numbers that had to follow before, each number with one group."""
        taken: set[tuple[str, str]] = set()
        alike = []
        for group in groups:
            fits = tuple(
                fit
                for fit in group.candidates
                if _kind(fit) in self._learned and (fit.module, fit.attribute) not in taken
            )
            taken.update((fit.module, fit.attribute) for fit in fits)
            alike.append(replace(group, fits=fits) if fits else group)
        return alike


def _kind(fit: Fit) -> str:
    """The number's place without the numbers of the blocks around it."""
    return re.sub(r"\d+", "#", f"{fit.module}.{fit.attribute}")


def _variants(kinds: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All of them, all but one, one alone; no more than a dozen."""
    sizes = dict.fromkeys((len(kinds), len(kinds) - 1, 1))
    found = (chosen for size in sizes if size > 0 for chosen in combinations(kinds, size))
    return islice(found, 12)


def _joined(groups: Sequence[Group]) -> Group:
    """One group of several of the same size: the n-th channels of all go together."""
    return replace(
        groups[0],
        members=tuple(member for group in groups for member in group.members),
        doubtful=True,
        candidates=tuple(dict.fromkeys(fit for group in groups for fit in group.candidates)),
        rescaled=tuple(part for group in groups for part in group.rescaled),
    )


class Trial:
    """A model to try cuts on, in which every channel matters.

    What is all one value would prove nothing: inputs, and tensors that were never trained (gammas
    of one, heads of zero), become noise.

    Args:
        model: is not changed.
        inputs: the forward's arguments.
        training: whether cuts must run in training mode too.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], *, training: bool) -> None:
        self.model = copied(model, share=True)
        self.inputs = tuple(map_tensors(_lively, x) for x in inputs)
        self._compute_in_float32()
        generator = torch.Generator().manual_seed(3)
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if _is_flat(tensor):
                tensor.data = _noise_around(tensor.data, generator)
        self.training_inputs: tuple[Any, ...] | None = None
        for given in (self.inputs, doubled(self.inputs)) if training else ():
            if self.training_inputs is None and not self._crash(self._copy().train(), given):
                self.training_inputs = given

    @torch.no_grad()
    def failure(self, groups: Sequence[Group]) -> str:
        """Why removing about half of each group is wrong; empty if it is right."""
        numbers = Counter((fit.module, fit.attribute) for group in groups for fit in group.fits)
        for (module, attribute), count in numbers.items():
            if count > 1:
                return f"{count} groups would set {f'{module}.{attribute}'.lstrip('.')}"
        generator = torch.Generator().manual_seed(0)
        # not the same share of each: sizes that the code takes from other groups would still fit
        shares = [(4, 3, 5, 6)[i % 4] for i in range(len(groups))]  # eighths
        sizes = [_odd(g.channels, n / 8) for g, n in zip(groups, shares, strict=True)]
        some = [torch.randperm(g.channels, generator=generator) for g in groups]
        orders_to_try = [some]
        if any(g.doubtful or g.channels < MANY for g in groups):  # a random half may fit by chance
            orders_to_try.append([torch.arange(g.channels) for g in groups])
        for orders in orders_to_try:
            stay = [best(*choice) for choice in zip(groups, orders, sizes, strict=True)]
            kept = list(zip(groups, stay, strict=True))
            reason = self._difference(kept)
            if reason in (OTHERWISE, NOT_A_NUMBER):
                reason = self._difference_without_norms(kept, reason)
            if reason:
                return reason
        return self._failure_in_training(kept)

    def _compute_in_float32(self) -> None:
        """Leave half precision, whose rounding errors hide right from wrong, where that runs."""
        if not any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters()):
            return
        exact = self._copy().eval().float()
        inputs = tuple(map_tensors(_exact, x) for x in self.inputs)
        if not self._crash(copied(exact, share=True), inputs):
            self.model, self.inputs = exact, inputs

    def _copy(self) -> nn.Module:
        return copied(self.model, share=True)

    @torch.no_grad()
    def _crash(self, model: nn.Module, inputs: tuple[Any, ...]) -> str:
        """What a forward raises, in one line; empty if it runs."""
        try:
            model(*fresh(inputs))
        except Exception as error:
            return in_one_line(error)
        return ""

    def _failure_in_training(self, kept: Sequence[tuple[Group, Tensor]]) -> str:
        if self.training_inputs is None:
            return ""
        removed = self._copy().train()
        remove_(removed, kept_positions(kept), fitted(kept))
        crash = self._crash(removed, self.training_inputs)
        return f"the cut model does not run in training mode: {crash}" if crash else ""

    def _difference(self, kept: Sequence[tuple[Group, Tensor]]) -> str:
        """How removing all channels but `kept` differs from zeroing them; empty if it does not."""
        removed = self._copy().eval()
        try:
            rescale_(removed, kept)
            remove_(removed, kept_positions(kept), fitted(kept))
            after = tensors_of(removed(*fresh(self.inputs)))
        except Exception as error:
            return f"the cut model does not run: {in_one_line(error)}"
        zeroed = self._copy().eval()
        _zero_(zeroed, kept)
        expected = tensors_of(zeroed(*fresh(self.inputs)))
        if not expected:
            return "the forward returns no tensor"
        if [x.shape for x in expected] != [x.shape for x in after]:
            return "its channels are the model's output"
        if any(x.isnan().any() for x in expected):
            return NOT_A_NUMBER
        return "" if _same(expected, after) else OTHERWISE

    def _difference_without_norms(self, kept: Sequence[tuple[Group, Tensor]], reason: str) -> str:
        """The same where something is computed over all channels of some groups.

        Those are not another function only if their channels can change places; all others must
        stand removal by themselves. Where channels of zeros give no number, as in front of a
        division by them, none can be compared with them, and all must change places.
        """
        normed = [group for group, _ in kept if group.normed or reason == NOT_A_NUMBER]
        if not normed or not all(_is_even(group) for group in normed):
            return reason
        others = [pair for pair in kept if pair[0] not in normed]
        if others and (reason := self._difference(others)):
            return reason
        original = tensors_of(self._copy().eval()(*fresh(self.inputs)))
        return "" if _same(original, self._permuted(normed)) else OTHERWISE

    def _permuted(self, groups: Sequence[Group]) -> list[Tensor]:
        """The outputs after permuting the channels of all groups in all their tensors."""
        generator = torch.Generator().manual_seed(1)
        probe = self._copy().eval()
        tensors = tensors_by_name(probe)
        for group in groups:
            order = torch.randperm(group.channels, generator=generator)
            for member in group.members:
                source = _moved(member, order)
                data = tensors[member.tensor].data
                tensors[member.tensor].data = data.index_select(member.dim, source.to(data.device))
        return tensors_of(probe(*fresh(self.inputs)))


def _odd(channels: int, share: float) -> int:
    """The nearest prime to a share that does not divide the whole; 1 if there is none.

    A view whose sizes are constants may hold a divisor by chance.

    >>> _odd(64, 0.375), _odd(4, 0.5), _odd(2, 0.5)
    (23, 3, 1)
    """
    primes = (n for n in range(2, channels) if all(n % k for k in range(2, isqrt(n) + 1)))
    fit = [n for n in primes if channels % n]
    return min(fit, key=lambda n: abs(n - channels * share), default=1)


def _lively(x: Tensor) -> Tensor:
    """The example itself; noise where all its numbers are equal, which would prove nothing."""
    if not x.is_floating_point() or not x.numel() or x.max() > x.min():
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    return noise.to(x.device, x.dtype)


def _exact(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _is_flat(tensor: Tensor) -> bool:
    """Whether several numbers are all the same."""
    return tensor.is_floating_point() and tensor.numel() > 1 and bool(tensor.max() == tensor.min())


def _noise_around(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Noise that keeps signals in scale: around 1 between 0.5 and 1.5; a weight by its fan-in."""
    fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
    noise = torch.rand(tensor.shape, generator=generator) - 0.5
    return tensor + (noise * (1 if fan_in == 1 else 3.5 / fan_in**0.5)).to(tensor)


def _zero_(model: nn.Module, kept: Sequence[tuple[Group, Tensor]]) -> None:
    """Silence all channels but the `kept` ones where they are made."""
    tensors = tensors_by_name(model)
    made = [
        (replace(g, members=tuple(m for m in g.members if m.role == "out")), k) for g, k in kept
    ]
    for name, dims in kept_positions(made).items():
        if name.endswith("running_var"):
            continue
        tensor = tensors[name]
        silent = tensor.data.clone()
        for dim, positions in dims.items():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[positions] = False
            silent.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0.0)
        tensor.data = silent


def _is_even(group: Group) -> bool:
    """Whether each tensor holds all channels equally often, so that they can change places."""
    counts = [m.channel[m.channel >= 0].bincount(minlength=group.channels) for m in group.members]
    return all((count == count[0]).all() for count in counts)


def _moved(member: Member, order: Tensor) -> Tensor:
    """Which old position each new position takes when channel c becomes channel order[c]."""
    source = torch.arange(len(member.channel))
    held = (member.channel >= 0).nonzero().flatten()
    if not held.numel():
        return source
    by_channel = held[torch.argsort(member.channel[held], stable=True)].reshape(len(order), -1)
    source[by_channel] = by_channel[order]  # row c: where channel c lives, in order
    return source


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Equal up to float error; shapes are equal already."""
    for x, y in zip(a, b, strict=True):
        x, y = x.double(), y.double()
        finite = x[x.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        if not torch.allclose(x, y, rtol=1e-3, atol=1e-4 * scale + 1e-7):
            return False
    return True
