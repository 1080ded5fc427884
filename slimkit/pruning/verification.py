"""Proves on an example that a group can be removed, before anything is cut.

Two exact statements, in evaluation mode: zeroing a group's channels gives the same output as
removing them; and, where a LayerNorm runs over them and forbids that, permuting the channels
consistently in all coupled tensors leaves the output unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.calls import map_tensors
from slimkit.copies import copied
from slimkit.interfaces import tensors_of
from slimkit.pruning.coupling import Coupling, Group, Member
from slimkit.pruning.removal import best, kept_positions, remove_, tensors_by_name

OTHERWISE = "removing its channels changes the output otherwise than zeroing them does"


def verified(model: nn.Module, coupling: Coupling, inputs: tuple[Any, ...]) -> Coupling:
    """The same coupling without the groups that fail, each frozen with its reason.

    All groups are tried at once first, then the doubtful apart from the others; what fails is
    halved until the culprits are alone.
    """
    inputs = tuple(map_tensors(_lively, x) for x in inputs)
    if not coupling.groups:
        return coupling
    frozen = dict(coupling.frozen)
    good = _holding(model, coupling.groups, inputs, frozen)
    if len(good) == len(coupling.groups):
        return coupling
    reason = _failure(model, good, inputs) if good else ""
    while reason and good:  # single groups hold but not all together: drop from the end
        frozen[good.pop().name] = f"together with other groups, {reason}"
        reason = _failure(model, good, inputs) if good else ""
    return Coupling(tuple(good), frozen)


def _holding(
    model: nn.Module, groups: Sequence[Group], inputs: tuple[Any, ...], frozen: dict[str, str]
) -> list[Group]:
    """The groups that can be removed; the others go into `frozen` with their reason."""
    reason = _failure(model, groups, inputs)
    if not reason:
        return list(groups)
    if len(groups) == 1:
        frozen[groups[0].name] = reason
        return []
    parts: list[Sequence[Group]]
    parts = [[g for g in groups if g.doubtful is doubt] for doubt in (False, True)]
    if not all(parts):
        middle = len(groups) // 2
        parts = [groups[:middle], groups[middle:]]
    good = [group for part in parts for group in _holding(model, part, inputs, frozen)]
    return [group for group in groups if any(group is one for one in good)]


def _lively(x: Tensor) -> Tensor:
    """The example itself; noise where all its numbers are equal, which would prove nothing."""
    if not x.is_floating_point() or not x.numel() or x.max() > x.min():
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    return noise.to(x.device, x.dtype)


@torch.no_grad()
def _failure(model: nn.Module, groups: Sequence[Group], inputs: tuple[Any, ...]) -> str:
    """Why removing half of each group is wrong; empty if it is right."""
    generator = torch.Generator().manual_seed(0)
    sizes = [max(1, group.channels // 2) for group in groups]
    some = [torch.randperm(g.channels, generator=generator) for g in groups]
    first = [torch.arange(g.channels) for g in groups]  # a random half can be its own mirror image
    for orders in (some, first):
        stay = [best(*choice) for choice in zip(groups, orders, sizes, strict=True)]
        reason = _difference(model, list(zip(groups, stay, strict=True)), inputs)
        if reason == OTHERWISE and all(_is_even(group) for group in groups):
            original = tensors_of(copied(model, share=True).eval()(*inputs))
            return "" if _same(original, _permuted(model, groups, inputs)) else reason
        if reason:
            return reason
    return ""


def _difference(
    model: nn.Module, kept: Sequence[tuple[Group, Tensor]], inputs: tuple[Any, ...]
) -> str:
    """How removing all channels but `kept` differs from zeroing them; empty if it does not."""
    removed = copied(model, share=True).eval()
    try:
        remove_(removed, kept_positions(kept))
        after = tensors_of(removed(*inputs))
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        return f"the cut model does not run: {type(error).__name__}: {said}"
    zeroed = copied(model, share=True).eval()
    for group, stay in kept:
        _zero_(zeroed, group, stay)
    expected = tensors_of(zeroed(*inputs))
    if [x.shape for x in expected] != [x.shape for x in after]:
        return "its channels are the model's output"
    if any(x.isnan().any() for x in expected):
        return "zeroing its channels gives NaN"
    return "" if _same(expected, after) else OTHERWISE


def _zero_(model: nn.Module, group: Group, stay: Tensor) -> None:
    """Silence all channels of `group` but `stay` where they are made."""
    tensors = tensors_by_name(model)
    keep = torch.zeros(group.channels + 1, dtype=torch.bool)
    keep[stay] = True
    keep[-1] = True
    for member in group.members:
        if member.role == "out" and not member.tensor.endswith("running_var"):
            gone = (~keep[member.channel]).nonzero().flatten()
            tensor = tensors[member.tensor]
            tensor.data = tensor.data.index_fill(member.dim, gone.to(tensor.device), 0.0)


def _is_even(group: Group) -> bool:
    """Whether each tensor holds all channels equally often, so that they can change places."""
    counts = [m.channel[m.channel >= 0].bincount(minlength=group.channels) for m in group.members]
    return all((count == count[0]).all() for count in counts)


def _permuted(model: nn.Module, groups: Sequence[Group], inputs: tuple[Any, ...]) -> list[Tensor]:
    """The outputs after permuting the channels of all groups in all their tensors."""
    generator = torch.Generator().manual_seed(1)
    probe = copied(model, share=True).eval()
    tensors = tensors_by_name(probe)
    for group in groups:
        order = torch.randperm(group.channels, generator=generator)
        for member in group.members:
            source = _moved(member, order)
            data = tensors[member.tensor].data
            tensors[member.tensor].data = data.index_select(member.dim, source.to(data.device))
    return tensors_of(probe(*inputs))


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
