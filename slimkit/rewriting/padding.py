"""Channels are filled up with zeros to a multiple that a target computes in.

The inverse of pruning: what belongs together is found and verified by `slimkit.pruning`, and all
tensors of a group grow in step. New rows of weights and biases are zero, and so are the new columns
of the layers that read them, so that it does not matter what an activation makes of a zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import nn

from slimkit.errors import PruningError, RewritingError, in_one_line
from slimkit.pruning.coupling import Group
from slimkit.pruning.prune import analyse
from slimkit.pruning.removal import tensors_by_name
from slimkit.rewriting.changes import NEW, Calls, Change, Padding
from slimkit.rewriting.exactness import difference
from slimkit.rewriting.found import Found, owner, traced


def pad_channels(
    model: nn.Module, inputs: tuple[Any, ...], *, multiple: int = 8, images: bool = False
) -> Found:
    """Groups of coupled channels grow to the next multiple.

    What goes in and out of the whole model keeps its channels.

    Args:
        model: not changed.
        inputs: the forward's arguments.
        multiple: of what the counts shall be.
        images: also fill up, by an operation in front, what convolutions read of the inputs.
    """
    if multiple < 2:
        raise RewritingError(f"pad-channels: multiple should be at least 2, not {multiple}")
    try:
        coupling = analyse(model, inputs)
    except PruningError as error:
        raise RewritingError(f"pad-channels: {error}") from error
    left = dict(coupling.frozen)
    normed = {group.name for group in coupling.groups if group.normed}
    wanted: list[Padding] = []
    for group in coupling.groups:
        if group.channels % multiple == 0:
            continue
        reason = _obstacle(group)
        if reason:
            left[group.name] = reason
        else:
            wanted.append(_padding(group, -group.channels % multiple))
    changes, failed = _holding(model, inputs, wanted)
    for name, reason in failed.items():
        left[name] = "something is computed over all of its channels" if name in normed else reason
    return Found([*changes, *(_images(model, inputs, multiple) if images else ())], left)


def _images(model: nn.Module, inputs: tuple[Any, ...], multiple: int) -> list[Change]:
    """Wider kernels, and an input filled up, for the convolutions that read the model's inputs."""
    calls = traced(model, inputs)
    changes: list[Change] = []
    for path in dict.fromkeys(c.weight_path for c in calls.calls):
        readers = [c for c in calls.calls if c.weight_path == path]
        call = readers[0]
        if path is None or any(c.inputs[0] not in calls.inputs for c in readers):
            continue
        module = model.get_submodule(owner(call))
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.groups != 1:
            continue
        channels, more = module.in_channels, -module.in_channels % multiple
        if not more:
            continue
        layout = (*range(channels), *[NEW] * more)
        sizes = (channels, channels + more)
        changes.append(Padding(f"input of {owner(call)}", sizes, {path: {1: layout}}))
        wide = {call.op: "the same over an input filled up with zeros"}
        changes.append(Calls(owner(call), wide, len(readers)))
    return changes


def _obstacle(group: Group) -> str:
    if group.partial:
        return "some tensors hold only a part of its channels"
    if group.rescaled:
        return "attention is scaled by their number"
    return ""


def _padding(group: Group, more: int) -> Padding:
    """How all tensors of the group grow by `more` channels.

    Behind each run of positions of the last channel comes as long a run for each new one.
    """
    layouts: dict[str, dict[int, tuple[int, ...]]] = {}
    last = group.channels - 1
    for member in group.members:
        before = layouts.setdefault(member.tensor, {}).get(member.dim)
        layout: list[int] = []
        for channel, run in groupby(
            before or range(len(member.channel)),
            key=lambda p, m=member: NEW if p == NEW else int(m.channel[p]),
        ):
            positions = list(run)
            layout += positions
            if channel == last:
                layout += [NEW] * (more * len(positions))
        layouts[member.tensor][member.dim] = tuple(layout)
    attributes: dict[str, dict[str, int]] = {}
    for fit in group.fits:
        numbers = attributes.setdefault(fit.module, {})
        numbers[fit.attribute] = fit.each * (group.channels + more)
    sizes = (group.channels, group.channels + more)
    return Padding(group.name, sizes, layouts, attributes)


def _holding(
    model: nn.Module, inputs: tuple[Any, ...], wanted: Sequence[Padding]
) -> tuple[list[Change], dict[str, str]]:
    """The paddings that leave the outputs as they are, fitted to each other; why others do not."""
    together = _fitted(model, wanted)
    if not wanted or not _reason(model, inputs, together):
        return together, {}
    good: list[Padding] = []
    failed: dict[str, str] = {}
    for one in wanted:
        reason = _reason(model, inputs, _fitted(model, [*good, one]))
        if reason:
            failed[one.group] = reason
        else:
            good.append(one)
    return _fitted(model, good), failed


def _fitted(model: nn.Module, paddings: Sequence[Padding]) -> list[Change]:
    """The same, one after another, where several groups share a dimension of a tensor."""
    now: dict[tuple[str, int], list[int]] = {}
    fitted: list[Change] = []
    sizes = {name: t.shape for name, t in tensors_by_name(model).items()}
    for one in paddings:
        layouts: dict[str, Mapping[int, tuple[int, ...]]] = {}
        for path, dims in one.layouts.items():
            moved: dict[int, tuple[int, ...]] = {}
            for dim, layout in dims.items():
                old = now.get((path, dim), list(range(sizes[path][dim])))
                moved[dim], now[path, dim] = _after(old, layout)
            layouts[path] = moved
        fitted.append(Padding(one.group, one.channels, layouts, one.attributes))
    return fitted


def _after(old: list[int], layout: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """`layout` of the first tensor as one of the tensor that `old` made of it, and both together.

    >>> _after([0, 1, NEW, 2], [0, 1, 2, NEW])
    ((0, 1, 2, 3, -1), [0, 1, -1, 2, -1])
    """
    behind: dict[int, int] = {}  # position of the first tensor -> new ones behind it
    last = NEW
    for position in layout:
        if position == NEW:
            behind[last] = behind.get(last, 0) + 1
        else:
            last = position
    step: list[int] = []
    both: list[int] = []
    for place, position in enumerate(old):
        step.append(place)
        both.append(position)
        more = behind.get(position, 0) if position != NEW else 0
        step += [NEW] * more
        both += [NEW] * more
    return tuple(step), both


def _reason(model: nn.Module, inputs: tuple[Any, ...], changes: Sequence[Change]) -> str:
    """Why the changes do not leave the outputs as they are; empty if they do."""
    try:
        return difference(model, inputs, changes)
    except Exception as error:
        return f"the padded model does not run: {in_one_line(error)}"
