"""A hash of what results depend on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def digest(text: str, *values: Any) -> str:
    """SHA-256 of a text and of all tensors in `values`, bit by bit."""
    found = hashlib.sha256(text.encode())
    for tensor in torch.utils._pytree.tree_leaves(values):
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
