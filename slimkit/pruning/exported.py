"""slimkit's own engine: finds coupled channels on the graph of `torch.export`."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from slimkit.batches import doubled
from slimkit.copies import copied
from slimkit.errors import PruningError
from slimkit.pruning import rules_layers, rules_moves, rules_values
from slimkit.pruning.coupling import Coupling, Group, Member, Role
from slimkit.pruning.identities import FIXED, Identities
from slimkit.pruning.propagation import Place, Propagation, tensors_of_value
from slimkit.pruning.removal import tensors_by_name


def groups_by_export(model: nn.Module, example_inputs: tuple[Any, ...]) -> Coupling:
    """Export `model` and list its groups of coupled channels.

    Every dimension of every tensor carries the identities of its channels through the graph; an
    operation that is not understood freezes what passes through it, with its name as the reason.

    Raises:
        PruningError: torch.export cannot write the model down.
    """
    probe = copied(model, share=True).eval()
    try:
        programs = [_written(probe, example_inputs)]
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise PruningError(
            f"{type(model).__name__} cannot be traced for pruning: torch.export says "
            f"{type(error).__name__}: {first} - check that model(*example_inputs) runs in "
            "evaluation mode and that its forward does not depend on the values of its data"
        ) from error
    training = _leaves_out(programs[0])
    if training:  # layers for the training only read channels as well
        for inputs in (example_inputs, doubled(example_inputs)):  # batch-norm may need two samples
            with suppress(Exception):  # then verification tells what stays
                programs.append(_written(probe.train(), inputs))
                break
    walk = Propagation(
        Identities(), {**rules_values.RULES, **rules_moves.RULES, **rules_layers.RULES}
    )
    tensors = tensors_by_name(probe)
    owners = {id(tensor): name for name, tensor in reversed(tensors.items())}
    for program in programs:
        _follow(program, walk, tensors, owners)
    return replace(_grouped(walk, tensors), training=training)


def _written(model: nn.Module, example_inputs: tuple[Any, ...]) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, example_inputs, strict=False)


def _leaves_out(program: ExportedProgram) -> bool:
    """Whether the graph has parameters that nothing reads."""
    parameters = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER
    }
    return any(node.name in parameters and not node.users for node in program.graph.nodes)


def _follow(
    program: ExportedProgram, walk: Propagation, tensors: dict[str, Tensor], owners: dict[int, str]
) -> None:
    """Carry identities through one graph, from its inputs to its outputs."""
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = kinds[node.name].target
            _enter(walk, node, kinds[node.name], owners.get(id(tensors.get(name))))
        elif node.op == "call_function":
            walk.call(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for dims in tensors_of_value(walk.value(source)):
                    walk.freeze(dims, "its channels are the model's output")


def _enter(walk: Propagation, node: fx.Node, spec: Any, tied: str | None) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return
    shape = [int(size) for size in value.shape]
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
        walk.state(node, spec.target, shape, tied)
    else:
        walk.argument(node, shape)


def _grouped(walk: Propagation, tensors: dict[str, Tensor]) -> Coupling:
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
    numbers: dict[int, dict[int, int]] = {}  # group -> identity -> channel
    names: dict[int, str] = {}
    frozen: dict[str, str] = {}
    for place, roots in made.items():
        free = roots[~stays[roots]].tolist()
        if free:
            key = int(group_of[free[0]])
            if key not in names:
                names[key] = _name(place, [*names.values()])
            numbering = numbers.setdefault(key, {})
            for root in free:
                numbering.setdefault(root, len(numbering))
    for place, roots in made.items():
        if stays[roots].all() and isinstance(tensors[place[0]], nn.Parameter):
            why = next((reasons[r] for r in roots.tolist() if r in reasons), "it is fixed")
            frozen.setdefault(_name(place, [*names.values()]), why)
    members: dict[int, list[Member]] = {key: [] for key in names}
    only_read = walk.reads - walk.makes
    for tensor, dims in walk.tensors.items():
        for d, dim in enumerate(dims):
            roots = labels[dim]
            for key in np.unique(group_of[roots[~stays[roots]]]).tolist():
                if key in names:
                    channel = torch.tensor([numbers[key].get(r, -1) for r in roots.tolist()])
                    role: Role = "in" if (tensor, d) in only_read else "out"
                    norm = walk.norms.get(tensor, "")
                    members[key].append(Member(tensor, d, role, channel, norm))
    for key in [key for key in names if len(numbers[key]) == 1]:
        frozen[names.pop(key)] = "it has a single channel"
    doubted = {root for ids in walk.doubts for root in labels[ids].tolist()}
    groups = [
        Group(name, len(numbers[key]), tuple(members[key]), not doubted.isdisjoint(numbers[key]))
        for key, name in names.items()
    ]
    return Coupling(tuple(groups), frozen)


def _name(place: Place, taken: list[str]) -> str:
    """The layer; if it makes several groups, the tensor, and then with its dimension."""
    tensor, d = place
    layer = tensor.rpartition(".")[0]
    names = (layer or tensor, tensor, f"{tensor}:{d}")
    return next((name for name in names if name not in taken), names[-1])
