"""A hash of what results depend on."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import nn


def digest(text: str, *values: Any) -> str:
    """SHA-256 of a text and of all tensors in `values`, bit by bit."""
    found = hashlib.sha256(text.encode())
    for tensor in torch.utils._pytree.tree_leaves(values):
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def code_of(network: nn.Module) -> list[str]:
    """What a network does with its weights: structure, plain attributes, and source of classes."""
    found = [repr(network)]
    for name, module in network.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None)}
        found.append(f"{name} {sorted(plain.items(), key=lambda item: item[0])}")
    for kind in dict.fromkeys(type(module) for module in network.modules()):
        try:
            found.append(inspect.getsource(kind))
        except (OSError, TypeError):  # made while running, or compiled
            found.append(kind.__qualname__)
    return found
