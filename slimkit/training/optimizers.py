"""Keeps optimizers right when parameters shrink under them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimkit.pruning.removal import Kept, cut


@torch.no_grad()
def shrink_optimizers_(
    optimizers: Iterable[torch.optim.Optimizer],
    model: nn.Module,
    kept: Kept,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Cut momenta and moments to what their parameters were cut to, to the last bit.

    Parameters keep their identity through the cut (see `slimkit.pruning.removal.remove_`), so
    parameter groups need no change. State of another shape than the parameter's (factored
    second moments) cannot be cut and is dropped, so that the optimizer starts it anew.

    Args:
        optimizers: all optimizers of the training.
        model: the model after the cut.
        kept: what remained of each tensor.
        shapes: each cut parameter's shape before.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for optimizer in optimizers:
        for name, dims in kept.items():
            parameter = named.get(name)
            state = optimizer.state.get(parameter) if parameter is not None else None
            if not state:
                continue
            for key, value in list(state.items()):
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                if tuple(value.shape) == shapes[name]:
                    state[key] = cut(value, dims)
                else:
                    del state[key]
