"""Gives a network its dense structure back, so that any checkpoint of the run can be loaded."""

from __future__ import annotations

import torch
from torch import nn

from slimkit.pruning.removal import tensors_by_name


@torch.no_grad()
def restore_(network: nn.Module, dense: nn.Module) -> None:
    """Let a network that was cut have the shapes and numbers of the dense one again.

    Parameters and buffers that were cut take the dense values, as objects they stay the same; the
    others keep theirs. A checkpoint overwrites them all.

    Args:
        network: of the same modules as `dense`.
        dense: as the network was.
    """
    tensors = tensors_by_name(network)
    cut = False
    for name, whole in tensors_by_name(dense).items():
        if name in tensors and tensors[name].shape != whole.shape:
            tensor = tensors[name]
            tensor.data = whole.detach().to(tensor.device, tensor.dtype, copy=True)
            tensor.grad = None
            cut = True
    if not cut:
        return
    parts = dict(network.named_modules())
    for name, whole_part in dense.named_modules():
        for key, value in vars(whole_part).items():
            if type(value) in (int, tuple) and vars(parts[name]).get(key) != value:
                setattr(parts[name], key, value)
    if hasattr(network, "slimkit_pruning"):
        del network.slimkit_pruning
    before = getattr(dense, "slimkit_pruning", None)
    if before is not None:  # it was cut before this run, too
        network.slimkit_pruning = before
