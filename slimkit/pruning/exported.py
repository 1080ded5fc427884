"""slimkit's own engine: finds coupled channels on the graph of `torch.export`."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from slimkit.copies import copied
from slimkit.errors import PruningError
from slimkit.pruning import rules_layers, rules_moves, rules_values
from slimkit.pruning.coupling import Coupling, Group, Member, Role
from slimkit.pruning.identities import Identities, Ids
from slimkit.pruning.propagation import Propagation, tensors_of_value


def groups_by_export(model: nn.Module, example_inputs: tuple[Any, ...]) -> Coupling:
    """Export `model` and list its groups of coupled channels.

    Every dimension of every tensor carries the identities of its channels through the graph; an
    operation that is not understood freezes what passes through it, with its name as the reason.

    Raises:
        PruningError: torch.export cannot write the model down.
    """
    probe = copied(model).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(probe, example_inputs, strict=False)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise PruningError(
            f"{type(model).__name__} cannot be traced for pruning: torch.export says "
            f"{type(error).__name__}: {first} - check that model(*example_inputs) runs in "
            "evaluation mode and that its forward does not depend on the values of its data"
        ) from error
    identities = Identities()
    walk = Propagation(
        identities, {**rules_values.RULES, **rules_moves.RULES, **rules_layers.RULES}
    )
    state: dict[str, list[Ids]] = {}
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            _enter(node, kinds[node.name], walk, state)
        elif node.op == "call_function":
            walk.call(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for dims in tensors_of_value(walk.value(source)):
                    for dim in dims:
                        identities.freeze(dim, "its channels are the model's output")
    return _grouped(identities, walk, state, [name for name, _ in model.named_modules()])


def _enter(node: fx.Node, spec: Any, walk: Propagation, state: dict[str, list[Ids]]) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return
    shape = [int(size) for size in value.shape]
    tracked = (InputKind.PARAMETER, InputKind.BUFFER)
    if spec.kind in tracked and spec.target is not None:
        state[spec.target] = walk.state(node, spec.target, shape)
    else:
        walk.argument(node, shape)


def _grouped(
    identities: Identities, walk: Propagation, state: dict[str, list[Ids]], order: list[str]
) -> Coupling:
    """Put channels that are made side by side into one group."""
    labels, reasons = identities.resolve()
    stays = np.zeros(len(labels), dtype=bool)
    stays[0] = True
    stays[list(reasons)] = True
    makers = sorted(
        walk.makes,
        key=lambda m: (
            order.index(m[0].rpartition(".")[0]) if m[0].rpartition(".")[0] in order else 0
        ),
    )
    made = {maker: labels[state[maker[0]][maker[1]]] for maker in makers if maker[0] in state}
    together = Identities()
    together.new(len(labels) - 1)
    for roots in made.values():
        free = roots[~stays[roots]]
        if len(free) > 1:
            together.tie(free[:-1], free[1:], "")
    group_of, _ = together.resolve()
    frozen: dict[str, str] = {}
    first: dict[int, str] = {}
    for (tensor, _), roots in made.items():
        layer = tensor.rpartition(".")[0] or tensor
        free = roots[~stays[roots]]
        if not free.size:
            why = next((reasons[r] for r in roots.tolist() if r in reasons), "it is fixed")
            frozen.setdefault(layer, why)
        for key in np.unique(group_of[free]).tolist():
            first.setdefault(key, layer)
    members: dict[int, list[Member]] = {key: [] for key in first}
    numbers: dict[int, dict[int, int]] = {key: {} for key in first}
    for (_, _), roots in made.items():
        for root in roots[~stays[roots]].tolist():
            numbering = numbers[int(group_of[root])]
            numbering.setdefault(root, len(numbering))
    for tensor, dims in state.items():
        for d, dim in enumerate(dims):
            roots = labels[dim]
            for key in np.unique(group_of[roots[~stays[roots]]]).tolist():
                if key not in numbers:
                    continue
                channel = torch.tensor([numbers[key].get(r, -1) for r in roots.tolist()])
                role: Role = "in" if (tensor, d) in walk.reads else "out"
                norm = walk.norms.get(tensor, "").rpartition(".")[0]
                members[key].append(Member(tensor, d, role, channel, norm))
    groups = [
        Group(first[key], len(numbers[key]), tuple(members[key]))
        for key in first
        if len(numbers[key]) > 1
    ]
    return Coupling(tuple(groups), frozen)
