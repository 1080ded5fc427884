"""Keeps what the processes of a training hold alike, where DDP does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from slimkit.errors import QuantizationError

Ranges = Mapping[str, tuple[Tensor, Tensor]]


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
    for gradients in _by_type(p.grad for p in learning if p.grad is not None):
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        _spread_(flat / dist.get_world_size(), gradients)


def check_alike(ranges: Ranges) -> None:
    """Refuse ranges that are not the same in all processes.

    Raises:
        QuantizationError: in all processes; it names one that differs from the first, and where.
    """
    mine = {name: [*scale.tolist(), *zero.tolist()] for name, (scale, zero) in ranges.items()}
    everyone: list[dict[str, list[float]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        for name in sorted(everyone[0].keys() | theirs.keys()):
            if theirs.get(name) != everyone[0].get(name):
                raise QuantizationError(
                    f"process {rank} has another range than process 0 at {name}: their networks "
                    "are not the same. Let every process start from the same weights and compute "
                    "the same operations"
                )


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        found[tensor.dtype].append(tensor)
    return [*found.values()]


def _spread_(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
