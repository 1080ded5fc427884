"""Keeps what the processes of a training hold alike, where DDP does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from slimkit.errors import SlimkitError
from slimkit.training.digest import digest


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def share_(tensors: Iterable[Tensor]) -> None:
    """Give every process the values of the first one, in one message a data type."""
    for several_tensors in _by_type(tensors):
        flat = torch.cat([t.detach().flatten() for t in several_tensors])
        dist.broadcast(flat, 0)
        _spread_(flat, several_tensors)


@torch.no_grad()
def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over all processes; a process without one has zeros."""
    learning = [p for p in parameters if p.requires_grad]
    for p in learning:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    average_(p.grad for p in learning if p.grad is not None)


@torch.no_grad()
def sum_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, which have the same shapes in all processes, by their sums over them."""
    for several_tensors in _by_type(tensors):
        flat = torch.cat([t.flatten() for t in several_tensors])
        dist.all_reduce(flat)
        _spread_(flat, several_tensors)


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace float tensors, with the same shapes in all processes, by their means over them."""
    mine = list(tensors)
    sum_(mine)
    for tensor in mine:
        tensor /= dist.get_world_size()


@torch.no_grad()
def averaged(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Means over all processes of float tensors that have the same names and shapes in each.

    Args:
        values: lie anywhere; so do the results.
        device: where messages start from.
    """
    found = {name: values[name].to(device, copy=True) for name in sorted(values)}
    average_(found.values())
    return {name: found[name].to(value.device) for name, value in values.items()}


def of_the_first(value: Any, device: torch.device) -> Any:
    """A structure of tensors and plain values as the first process has it, on `device`."""
    message = [tree_map_only(Tensor, lambda t: t.detach().cpu(), value)]
    dist.broadcast_object_list(message, 0, device=device)
    return tree_map_only(Tensor, lambda t: t.to(device), message[0])


def check_alike(mine: Mapping[str, Any], what: str, error: type[SlimkitError]) -> None:
    """Refuse what is not the same in all processes.

    Args:
        mine: by name, what this process has: a tensor, or what compares.
        what: it is, for the message: "range".
        error: to raise, in all processes; it names one that differs from the first, and where.
    """
    marks = {name: _mark(value) for name, value in mine.items()}
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, marks)
    for rank, theirs in enumerate(everyone):
        for name in sorted(everyone[0].keys() | theirs.keys()):
            if theirs.get(name) != everyone[0].get(name):
                raise error(
                    f"process {rank} has another {what} than process 0 at {name}: their networks "
                    "are not the same. Let every process start from the same weights and recipe, "
                    "and compute the same operations"
                )


def _mark(value: Any) -> Any:
    """What takes little room in a message, and differs where the value does."""
    if isinstance(value, Tensor):
        return tuple(value.shape), digest("", value)
    if isinstance(value, list | tuple):
        return [_mark(part) for part in value]
    return value


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        found[tensor.dtype].append(tensor)
    return [*found.values()]


def _spread_(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
