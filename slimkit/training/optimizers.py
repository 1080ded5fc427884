"""Keeps optimizers right when parameters shrink under them, and when new ones come."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.errors import SlimkitError
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


_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_RATE_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")


def add_group_(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    schedulers: Iterable[Any],
    *,
    learning_rate_scale: float = 1.0,
    weight_decay: float = 0.0,
    what: str = "learned ranges",
    way_out: str = "choose quantizers without parameters (minmax, percentile)",
) -> None:
    """Let an optimizer in the middle of its work train `parameters` too, in a group of their own.

    The group is as the optimizer's first one but for what is given here. Schedulers go on: the
    learning rate of the group stays at the same multiple of the first one's.

    Args:
        optimizer: those of `parameters` that it holds already are left where they are.
        parameters: by any name.
        schedulers: all of the training; those of other optimizers are left alone.
        learning_rate_scale: the group's learning rate over the first one's.
        weight_decay: of the group.
        what: the parameters are, for messages and for optimizers that name their groups.
        way_out: from an optimizer that cannot train them.

    Raises:
        SlimkitError: the optimizer knows no groups.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = {name: p for name, p in parameters.items() if id(p) not in held}
    if not new:
        return
    if isinstance(optimizer, torch.optim.LBFGS):
        raise SlimkitError(
            f"LBFGS cannot train {what}, as it knows no parameter groups: {way_out}, or take "
            "another optimizer"
        )
    before = len(optimizer.param_groups)
    group = {k: copy.deepcopy(v) for k, v in optimizer.param_groups[0].items() if k != "params"}
    group |= {key: group[key] * learning_rate_scale for key in _RATES if key in group}
    if "weight_decay" in group:
        group["weight_decay"] = weight_decay
    if "name" in group:
        group["name"] = what
    named = "param_names" in group and group.pop("param_names")
    optimizer.add_param_group({**group, "params": [*(new.items() if named else new.values())]})
    for scheduler in _each(schedulers):
        if getattr(scheduler, "optimizer", None) is not optimizer:
            continue
        for name in (*_RATE_LISTS, *_OTHER_LISTS):
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == before:
                factor = learning_rate_scale if name in _RATE_LISTS else None
                values.append(values[0] if factor is None else values[0] * factor)


def _each(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers, and those that they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from _each(getattr(scheduler, "_schedulers", ()))
