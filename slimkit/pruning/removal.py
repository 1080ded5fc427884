"""Cuts channels out of a model's tensors and brings the layers' attributes in line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from slimkit.errors import ArtifactError
from slimkit.evaluating import evaluating

if TYPE_CHECKING:  # an artifact is loaded without Torch-Pruning, which `coupling` imports
    from slimkit.pruning.coupling import Group

Kept = dict[str, dict[int, list[int]]]
"""The positions that remain: tensor path -> dimension -> sorted positions in the original."""

Attributes = dict[str, dict[str, int]]
"""Whole numbers that the user's modules hold: module path -> name -> number."""


def kept_positions(kept: Iterable[tuple[Group, Tensor]]) -> Kept:
    """Turn kept channels per group into kept positions per tensor.

    Args:
        kept: groups with the channel numbers that remain, int64.
    """
    masks: dict[tuple[str, int], Tensor] = {}
    for group, channels in kept:
        stays = torch.zeros(group.channels + 1, dtype=torch.bool)
        stays[channels] = True
        stays[-1] = True  # position -1: channels of another group
        for member in group.members:
            key = (member.tensor, member.dim)
            mask = stays[member.channel]
            masks[key] = masks[key] & mask if key in masks else mask
    positions: Kept = {}
    for (tensor, dim), mask in masks.items():
        if not mask.all():
            positions.setdefault(tensor, {})[dim] = mask.nonzero().flatten().tolist()
    return positions


def fitted(kept: Iterable[tuple[Group, Tensor]]) -> Attributes:
    """What the numbers in the user's modules become where only `kept` channels stay."""
    numbers: Attributes = {}
    for group, channels in kept:
        if len(channels) < group.channels:
            for fit in group.fits:
                numbers.setdefault(fit.module, {})[fit.attribute] = fit.each * len(channels)
    return numbers


@torch.no_grad()
def rescale_(model: nn.Module, kept: Iterable[tuple[Group, Tensor]]) -> None:
    """Scale queries such that attention, which divides by the root of a size, stays the same.

    Must come before the cut.
    """
    tensors = tensors_by_name(model)
    done: set[tuple[int, int]] = set()  # tied tensors have several names
    for group, channels in kept:
        factor = (len(channels) / group.channels) ** 0.5
        for part in group.rescaled if factor < 1 else ():
            tensor = tensors[part.tensor]
            if (id(tensor), int(part.positions[0])) in done:
                continue
            done.add((id(tensor), int(part.positions[0])))
            scale = torch.ones(tensor.shape[part.dim], dtype=tensor.dtype, device=tensor.device)
            scale[part.positions] = factor
            shape = [-1 if d == part.dim else 1 for d in range(tensor.dim())]
            tensor.data = tensor.data * scale.reshape(shape)


def best(group: Group, order: Tensor, size: int) -> Tensor:
    """The first `size` channels of `order`, sorted; and the first of a tensor that has none then.

    A tensor may hold some of a group's channels only, where a concatenation is added to another.
    """
    stays = torch.zeros(group.channels + 1, dtype=torch.bool)
    stays[order[:size]] = True
    stays[-1] = True  # position -1: channels of another group
    for member in group.partial:
        if not stays[member.channel].any():
            stays[order[torch.isin(order, member.channel)][0]] = True
    return stays[:-1].nonzero().flatten()


def cut(tensor: Tensor, dims: Mapping[int, list[int]]) -> Tensor:
    """Only the positions in `dims` (dimension -> positions) of `tensor`, contiguous."""
    for dim, positions in dims.items():
        tensor = tensor.index_select(dim, torch.tensor(positions, device=tensor.device))
    return tensor


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, tied ones under each of their names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


@torch.no_grad()
def remove_(model: nn.Module, kept: Kept, attributes: Attributes | None = None) -> None:
    """Cut `model` down to the `kept` positions in place, and set the numbers in `attributes`.

    Parameters stay the same objects with smaller data (so optimizers and weight ties still hold
    them); their gradients are dropped.

    Raises:
        ArtifactError: a tensor or number is missing, or a tensor is too small for a position;
            nothing was cut.
    """
    modules = dict(model.named_modules())
    for path, numbers in (attributes or {}).items():
        for name in numbers:
            if type(getattr(modules.get(path), name, None)) is not int:
                raise ArtifactError(
                    f"the model has no whole number {f'{path}.{name}'.lstrip('.')!r}; was it built "
                    "differently?"
                )
    tensors = tensors_by_name(model)
    for name, dims in kept.items():
        if name not in tensors:
            raise ArtifactError(f"the model has no tensor {name!r}; was it built differently?")
        for dim, positions in dims.items():
            size = tensors[name].shape[dim] if dim < tensors[name].dim() else 0
            if not positions or max(positions) >= size:
                raise ArtifactError(
                    f"{name} has {size} channels in dimension {dim}, but position "
                    f"{max(positions, default=-1)} should be kept; was the model built differently?"
                )
    done: set[int] = set()
    for name, dims in kept.items():
        tensor = tensors[name]
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        tensor.grad = None
        smaller = cut(tensor.data, dims)
        if tensor.requires_grad:  # else autograd goes on expecting gradients of the old shape
            forget_gradient_shape_(tensor)
        tensor.data = smaller
    for module in modules.values():
        fit_attributes_(module)
    for path, numbers in (attributes or {}).items():
        for name, number in numbers.items():
            setattr(modules[path], name, number)
    with evaluating(model):  # modules that keep what they computed of old weights drop it here
        pass


def forget_gradient_shape_(tensor: Tensor) -> None:
    """Make autograd take the tensor's shape anew at the next forward.

    As long as a graph lives that read the tensor (a loss that was kept), its gradient accumulator
    is used again, with the old shape; PyTorch makes a new one only when the type changes.
    """
    other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)


def fit_attributes_(module: nn.Module) -> None:
    """Bring the sizes that a layer remembers in line with its tensors."""
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            multiplier = module.out_channels // module.groups
            transposed = isinstance(module, _ConvTransposeNd)
            module.groups = module.in_channels = first if transposed else first // multiplier
            module.out_channels = module.groups * multiplier
        elif isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        for tensor in (module.weight, module.running_mean):
            if isinstance(tensor, Tensor):
                module.num_features = tensor.shape[0]
    elif isinstance(module, nn.GroupNorm) and isinstance(module.weight, Tensor):
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and isinstance(module.weight, Tensor):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.RNNCellBase | nn.RNNBase):
        end = "" if isinstance(module, nn.RNNCellBase) else "_l0"
        read, again = getattr(module, f"weight_ih{end}"), getattr(module, f"weight_hh{end}")
        module.input_size, module.hidden_size = read.shape[1], again.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]


def compose(first: Kept, second: Kept) -> Kept:
    """The positions in the original model after cutting `first` and then `second`.

    >>> compose({"w": {0: [1, 3, 5]}}, {"w": {0: [0, 2]}})
    {'w': {0: [1, 5]}}
    """
    result = {name: dict(dims) for name, dims in first.items()}
    for name, dims in second.items():
        for dim, positions in dims.items():
            before = result.setdefault(name, {}).get(dim)
            result[name][dim] = [before[p] for p in positions] if before else list(positions)
    return result


def merged(first: Attributes, second: Attributes) -> Attributes:
    """The numbers after setting `first` and then `second`.

    >>> merged({"a": {"heads": 4, "dim": 64}}, {"a": {"heads": 2}})
    {'a': {'heads': 2, 'dim': 64}}
    """
    return first | {path: first.get(path, {}) | numbers for path, numbers in second.items()}
