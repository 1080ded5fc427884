"""Keeps optimizers right when parameters shrink under them, and when new ones come."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
    parameter groups need no change. Factored moments, of size 1 where they are factored, are cut in
    the dimensions that they have. Where a parameter has any other state (a preconditioner), all of
    its state is dropped, so that the optimizer starts it anew; so is all of LBFGS, whose history is
    of all parameters in one.

    Args:
        optimizers: all optimizers of the training.
        model: the model after the cut.
        kept: what remained of each tensor.
        shapes: each cut parameter's shape before.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()
            optimizer._numel_cache = None
            continue
        for name, dims in kept.items():
            parameter = named.get(name)
            state = optimizer.state.get(parameter) if parameter is not None else None
            if not state:
                continue
            moments = {k: v for k, v in state.items() if not _is_plain(v)}
            if all(_is_moment(value, shapes[name]) for value in moments.values()):
                for key, value in moments.items():
                    own = {d: p for d, p in dims.items() if value.shape[d] == shapes[name][d]}
                    state[key] = cut(value, own)
            else:
                state.clear()


def _is_plain(value: Any) -> bool:
    """A number, a flag or nothing: what no parameter's shape is in."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    return not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _is_moment(value: Any, shape: tuple[int, ...]) -> bool:
    """A tensor of the parameter's shape, or of size 1 in some dimensions."""
    if not isinstance(value, Tensor) or value.dim() != len(shape):
        return False
    return all(size in (full, 1) for size, full in zip(value.shape, shape, strict=True))


def optimizer_of(
    optimizers: Sequence[torch.optim.Optimizer], network: nn.Module
) -> torch.optim.Optimizer:
    """The first that trains something of the network; the first of all where none does."""
    own = {id(p) for p in network.parameters()}
    return next((o for o in optimizers if not own.isdisjoint(held_by([o]))), optimizers[0])


def held_by(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """Ids of the parameters that optimizers hold."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {id(p) for group in groups for p in group["params"]}


OWNER = "slimkit"
"""Key of a parameter group that `add_group_` made, with what it trains."""


def places_of(states: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Where the groups of `add_group_` stand in optimizers whose states these are."""
    return {
        group[OWNER]: number
        for state in states
        for number, group in enumerate(state["param_groups"])
        if OWNER in group
    }


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
    place: int | None = None,
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
        place: of the group among the optimizer's; left out, behind all of them.

    Raises:
        SlimkitError: the optimizer knows no groups.
    """
    held = held_by([optimizer])
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
    group[OWNER] = what
    optimizer.add_param_group({**group, "params": [*(new.items() if named else new.values())]})
    place = before if place is None else min(place, before)
    optimizer.param_groups.insert(place, optimizer.param_groups.pop())
    for scheduler in _each(schedulers):
        if getattr(scheduler, "optimizer", None) is not optimizer:
            continue
        for name in (*_RATE_LISTS, *_OTHER_LISTS):
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == before:
                factor = learning_rate_scale if name in _RATE_LISTS else None
                values.insert(place, values[0] if factor is None else values[0] * factor)


def _each(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers, and those that they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from _each(getattr(scheduler, "_schedulers", ()))
