"""The second engine: finds coupled channels on Torch-Pruning's dependency graph.

Fang et al. 2023, DepGraph, https://arxiv.org/abs/2301.12900. The rest of slimkit sees named tensors
and channel numbers only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from slimkit.copies import copied
from slimkit.errors import PruningError
from slimkit.pruning.coupling import Coupling, Group, Member, Role


def groups_by_dependency_graph(model: nn.Module, example_inputs: tuple[Any, ...]) -> Coupling:
    """Trace `model` and list its groups of coupled channels.

    Groups are disjoint and in the order in which the model lists its layers. What cannot be
    removed is left out with its reason: grouped convolutions, parameters outside known layers.
    `model` is not changed.

    Raises:
        PruningError: the model cannot be traced.
    """
    probe = copied(model).eval()
    for parameter in probe.parameters():
        parameter.requires_grad_(True)
    graph = tp.DependencyGraph()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(probe, example_inputs=_plain(example_inputs), verbose=False)
            found = list(
                graph.get_all_groups(root_module_types=[nn.modules.conv._ConvNd, nn.Linear])
            )
    except Exception as error:
        raise PruningError(
            f"{type(model).__name__} cannot be traced for pruning: {type(error).__name__}: {error} "
            "- check that model(*example_inputs) runs in evaluation mode and returns tensors that "
            "depend on its parameters."
        ) from error
    names = {module: name for name, module in probe.named_modules()}
    order = {name: position for position, name in enumerate(names.values())}
    parameters = dict(probe.named_parameters())
    groups: list[Group] = []
    frozen: dict[str, str] = {}
    for raw in found:
        name = names[raw[0].dep.target.module]
        members, reason = _members(raw, names)
        if reason:
            frozen[name] = reason
        else:
            channels = raw[0].dep.target.module.weight.shape[members[0].dim]
            makers = [
                m.tensor.rpartition(".")[0]
                for m in members
                if m.role == "out" and parameters.get(m.tensor, m.channel).dim() > 1
                if (m.channel >= 0).all()  # all of its output, so it is in no other group
            ]
            first = min([name, *makers], key=lambda maker: order[maker])
            groups.append(Group(first, channels, tuple(members), normed=True))  # it cannot tell
    return Coupling(tuple(sorted(groups, key=lambda group: order[group.name])), frozen)


def _plain(example_inputs: tuple[Any, ...]) -> Sequence[Any]:
    """Detached copies, so that tracing leaves no gradient in the caller's tensors."""
    return [x.detach().clone() if isinstance(x, Tensor) else x for x in example_inputs]


def _members(raw: Any, names: dict[nn.Module, str]) -> tuple[list[Member], str]:
    """The members of one of Torch-Pruning's groups, or the reason why it must stay whole."""
    members: list[Member] = []
    for item in raw:
        node, handler = item.dep.target, item.dep.handler.__name__
        module = node.module
        if isinstance(module, nn.Parameter):
            return [], "it passes through a parameter outside any known layer"
        if not isinstance(module, nn.Module) or module not in names:
            if node.type == tp.ops.OPTYPE.OUTPUT:
                return [], "its channels are the model's output"
            continue
        role: Role = "in" if handler == "prune_in_channels" else "out"
        found = list(_tensors(module, role))
        if not found:
            if isinstance(module, nn.PReLU):
                continue  # one slope for all channels
            if any(True for _ in module.parameters(recurse=False)):
                return [], f"{names[module]} ({type(module).__name__}) cannot be cut"
            continue
        for tensor, dim in found:
            if tensor not in module._parameters and tensor not in module._buffers:
                return [], f"{names[module]}.{tensor} is computed from other parameters"
            size = getattr(module, tensor).shape[dim]
            channel = torch.full((size,), -1, dtype=torch.int64)
            if max(item.idxs, default=0) >= size:
                return [], f"{names[module]} has fewer channels than the analysis expects"
            channel[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
            path = f"{names[module]}.{tensor}".lstrip(".")
            behind = [n.module for n in node.outputs if isinstance(n.module, _BatchNorm)]
            norm = names[behind[0]] if behind else ""
            members.append(Member(path, dim, role, channel, norm))
    return members, ""


def _tensors(module: nn.Module, role: Role) -> Iterator[tuple[str, int]]:
    """Which tensors of a layer carry its outgoing or incoming channels, and in which dimension."""
    if isinstance(module, _ConvNd):
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        if module.groups > 1 and not depthwise:
            return
        transposed = isinstance(module, _ConvTransposeNd)
        if role == "in" and not depthwise:
            yield "weight", int(not transposed)
            return
        yield "weight", int(transposed and not depthwise)
        if module.bias is not None:
            yield "bias", 0
    elif isinstance(module, nn.Linear):
        if role == "in":
            yield "weight", 1
            return
        yield "weight", 0
        if module.bias is not None:
            yield "bias", 0
    elif isinstance(module, _BatchNorm | nn.LayerNorm):
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return
        for name in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(getattr(module, name, None), Tensor):
                yield name, 0
    elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
        yield "weight", 0
