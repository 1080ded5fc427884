"""slimkit's own engine: finds coupled channels in the operations of a model's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimkit.batches import doubled, fresh
from slimkit.copies import copied
from slimkit.errors import PruningError, in_one_line
from slimkit.pruning import rules_layers, rules_moves, rules_recurrent, rules_values
from slimkit.pruning.coupling import Attention, Coupling, Fit, Group, Member, Rescaled, Role
from slimkit.pruning.exporting import exported
from slimkit.pruning.heads import views_of_heads
from slimkit.pruning.identities import FIXED, Identities, Ids
from slimkit.pruning.propagation import Doubt, Place, Propagation, tensors_of_value
from slimkit.pruning.recording import NoOutputError, recorded
from slimkit.pruning.removal import tensors_by_name
from slimkit.pruning.written import Written

COLOURS = 4  # channels of an image or a signal

Writer = Callable[[nn.Module, tuple[Any, ...]], Written]


def groups_by_analysis(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    writers: Sequence[Writer] = (recorded, exported),
    *,
    attention: Attention = "dimensions",
) -> Coupling:
    """Write `model` down and list its groups of coupled channels.

    Every dimension of every tensor carries the identities of its channels through the graph; an
    operation that is not understood freezes what passes through it, with its name as the reason.

    Args:
        model: is not changed.
        example_inputs: the forward's arguments.
        writers: what writes the graph; the next is tried where one fails.
        attention: whether the channels of attention are ``dimensions``, each in all heads, or whole
            ``heads``.

    Raises:
        PruningError: no writer can write the model down.
    """
    probe = copied(model, share=True).eval()
    whole, write = _written(probe, example_inputs, writers)
    graphs = [whole]
    training = not whole.reads(name for name, _ in probe.named_parameters())
    if training:  # layers for the training only read channels as well
        for inputs in (example_inputs, doubled(example_inputs)):  # batch-norm may need two samples
            with suppress(Exception):  # then verification tells what stays
                graphs.append(write(probe.train(), inputs))
                break
    rules = (rules_values, rules_moves, rules_layers, rules_recurrent)
    walk = Propagation(Identities(), {k: v for part in rules for k, v in part.RULES.items()})
    tensors = tensors_by_name(probe)
    owners = {id(tensor): name for name, tensor in reversed(tensors.items())}
    for written in graphs:
        if attention == "heads":
            walk.head_views |= views_of_heads(written.graph)
        _follow(written, walk, tensors, owners)
    return replace(_grouped(walk, tensors, dict(probe.named_modules())), training=training)


def _written(
    model: nn.Module, example_inputs: tuple[Any, ...], writers: Sequence[Writer]
) -> tuple[Written, Writer]:
    """What the first writer that can do it writes, and that writer."""
    errors: list[Exception] = []
    for write in writers:
        try:
            return write(model, example_inputs), write
        except Exception as error:
            errors.append(error)
            if isinstance(error, NoOutputError) or not _runs(model, example_inputs):
                break
    raise PruningError(
        f"{type(model).__name__} cannot be traced for pruning: {in_one_line(errors[0])} - check "
        "that model(*example_inputs) runs in evaluation mode and that its forward does not depend "
        "on the values of its data"
    ) from errors[0]


@torch.no_grad()
def _runs(model: nn.Module, example_inputs: tuple[Any, ...]) -> bool:
    try:
        model(*fresh(example_inputs))
    except Exception:
        return False
    return True


def _follow(
    written: Written, walk: Propagation, tensors: dict[str, Tensor], owners: dict[int, str]
) -> None:
    """Carry identities through one graph, from its inputs to its outputs."""
    for node in written.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            shape = [int(size) for size in value.shape]
            for name in written.state.get(node, ()):
                walk.state(node, name, shape, owners.get(id(tensors.get(name))))
            if node in written.state:
                continue
            if node in written.constants:
                walk.constant(node, shape)
            else:
                walk.argument(node, shape)
        elif node.op == "call_function":
            walk.call(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for dims in tensors_of_value(walk.value(source)):
                    walk.freeze(dims, "its channels are the model's output")


def _grouped(
    walk: Propagation, tensors: dict[str, Tensor], modules: Mapping[str, nn.Module]
) -> Coupling:
    """Put channels that are made side by side into one group."""
    order = {name: position for position, name in enumerate(tensors)}
    labels, reasons = walk.ids.resolve()
    stays = np.zeros(len(labels), dtype=bool)
    stays[[FIXED, *reasons]] = True
    places = sorted(walk.makes, key=lambda place: (order[place[0]], place[1]))
    made = {(tensor, d): labels[walk.tensors[tensor][d]] for tensor, d in places}
    together = Identities()
    together.new(len(labels) - 1)
    for roots in made.values():
        free = roots[~stays[roots]]
        together.tie(free[:-1], free[1:], "")
    group_of, _ = together.resolve()
    number_of = np.full(len(labels), -1)  # identity -> channel of its group
    sizes: dict[int, int] = {}
    names: dict[int, str] = {}
    frozen: dict[str, str] = {}
    for place, roots in made.items():
        free = roots[~stays[roots]]
        if free.size:
            key = int(group_of[free[0]])
            if key not in names:
                names[key] = _name(place, [*names.values()])
            fresh, where = np.unique(free[number_of[free] < 0], return_index=True)
            number_of[fresh[np.argsort(where)]] = np.arange(len(fresh)) + sizes.get(key, 0)
            sizes[key] = sizes.get(key, 0) + len(fresh)
    for place, roots in made.items():
        if stays[roots].all() and isinstance(tensors[place[0]], nn.Parameter):
            why = next((reasons[r] for r in roots.tolist() if r in reasons), "it is fixed")
            frozen.setdefault(_name(place, [*names.values()]), why)
    members: dict[int, list[Member]] = {key: [] for key in names}
    only_read = walk.reads - walk.makes
    for tensor, dims in walk.tensors.items():
        for d, dim in enumerate(dims):
            roots = labels[dim]
            groups_here, numbers = group_of[roots], np.where(stays[roots], -1, number_of[roots])
            for key in np.unique(groups_here[~stays[roots]]).tolist():
                if key in names:
                    channel = torch.from_numpy(np.where(groups_here == key, numbers, -1))
                    role: Role = "in" if (tensor, d) in only_read else "out"
                    norm = walk.norms.get(tensor, "")
                    members[key].append(Member(tensor, d, role, channel, norm))
    for key in [key for key, size in sizes.items() if size == 1]:
        frozen[names.pop(key)] = "it has a single channel"
    doubts: dict[int, list[Doubt]] = {}
    for doubt in walk.doubts:
        for key in np.unique(group_of[labels[doubt.ids]]).tolist():
            doubts.setdefault(key, []).append(doubt)
    over = [part for ids in walk.normed for part in walk.ids.parts(ids)]
    normed = {key for ids in over for key in np.unique(group_of[labels[ids[ids > FIXED]]]).tolist()}
    rescaled: dict[int, list[Rescaled]] = {}
    for ids, rows in walk.queries:
        for key in np.unique(group_of[labels[ids]]).tolist():
            for part in _rescaled(walk, ids, rows, members.get(key, [])):
                if not any(part.overlaps(other) for other in rescaled.get(key, [])):
                    rescaled.setdefault(key, []).append(part)
    groups = [
        Group(
            name,
            sizes[key],
            tuple(members[key]),
            doubtful=key in doubts,
            candidates=_candidates(doubts.get(key, []), modules, sizes[key]),
            rescaled=tuple(rescaled.get(key, [])),
            normed=key in normed,
            first=_is_first(walk, members[key], tensors),
        )
        for key, name in names.items()
    ]
    return Coupling(tuple(groups), frozen)


def _is_first(walk: Propagation, members: Sequence[Member], tensors: Mapping[str, Tensor]) -> bool:
    """Whether one convolution over at most `COLOURS` channels of the input makes the channels."""
    weights = {
        (member.tensor, member.dim): tensors[member.tensor].shape
        for member in members
        if (member.tensor, member.dim) in walk.makes and tensors[member.tensor].dim() > 1
    }
    depthwise = {place for place, shape in weights.items() if shape[1] == 1 and len(shape) > 2}
    first = {place for place in weights if place in walk.first}
    return first == weights.keys() - (depthwise - first) and all(
        len(weights[place]) > 2 and weights[place][1] <= COLOURS for place in first
    )


def _candidates(
    doubts: Sequence[Doubt], modules: Mapping[str, nn.Module], channels: int
) -> tuple[Fit, ...]:
    """Whole numbers in the modules of the user's code that equal a size that may have to shrink."""
    found: dict[Fit, None] = {}
    for doubt in doubts:
        module = modules.get(doubt.module)
        if module is None or type(module).__module__.startswith("torch.nn."):
            continue  # layers that slimkit knows
        for name, value in vars(module).items():
            if type(value) is int and value > 1 and value in doubt.sizes and not value % channels:
                found[Fit(doubt.module, name, value // channels)] = None
    return tuple(found)


def _rescaled(
    walk: Propagation, ids: Ids, rows: int, members: Sequence[Member]
) -> Iterator[Rescaled]:
    """Where the queries of attention are made: as many rows as they have, from the first on."""
    made = {place for place in walk.where(ids) if place in walk.makes}
    for tensor, d in made:
        own = walk.tensors[tensor][d]
        start = int(np.searchsorted(own, ids.min()))
        positions = torch.arange(start, min(start + rows, len(own)))
        layer = tensor.rpartition(".")[0]
        for member in members:
            same = member.tensor.rpartition(".")[0] == layer and len(member.channel) == len(own)
            if same and member.role == "out":
                yield Rescaled(member.tensor, member.dim, positions)


def _name(place: Place, taken: list[str]) -> str:
    """The layer; if it makes several groups, the tensor, and then with its dimension."""
    tensor, d = place
    layer = tensor.rpartition(".")[0]
    names = (layer or tensor, tensor, f"{tensor}:{d}")
    return next((name for name in names if name not in taken), names[-1])
