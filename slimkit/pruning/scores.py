"""Turns a criterion's scores of weights into one importance per channel of each group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.errors import PruningError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Criterion, Layer
from slimkit.pruning.coupling import Coupling, Member

Loss = Callable[[nn.Module, Any], Tensor]
"""Takes the model and one batch, gives the scalar to differentiate."""


def group_scores(model: nn.Module, coupling: Coupling, criterion: Criterion) -> dict[str, Tensor]:
    """Importance of each channel: group name to float64 of shape (channels,).

    The criterion's scores are summed over each channel's weights and over all coupled layers, and
    divided by the group's mean, so that groups can be ranked against each other. Gradients, where
    the criterion needs them, are taken from the parameters' ``.grad``.

    Raises:
        PruningError: a gradient is missing, or a score is not finite.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    totals = {g.name: torch.zeros(g.channels, dtype=torch.float64) for g in coupling.groups}
    members: dict[str, list[tuple[str, Member]]] = {}
    for group in coupling.groups:
        for member in group.members:
            members.setdefault(member.tensor, []).append((group.name, member))
    for name, holders in members.items():
        weight = tensors.get(name)
        if weight is None or weight.dim() < 2:
            continue
        norm = next((member.norm for _, member in holders if member.norm), "")
        layer = Layer(
            name=name,
            weight=weight.detach(),
            gradient=gradient_of(name, weight, criterion),
            norm_scale=_detached(tensors.get(f"{norm}.weight")),
        )
        score = criterion.score(layer).expand_as(weight)
        for group_name, member in holders:
            others = [d for d in range(weight.dim()) if d != member.dim]
            sums = score.sum(others, dtype=torch.float64).cpu()
            inside = member.channel >= 0
            totals[group_name].index_add_(0, member.channel[inside], sums[inside])
    return {name: _normalized(name, total, criterion) for name, total in totals.items()}


def _normalized(group: str, total: Tensor, criterion: Criterion) -> Tensor:
    if not torch.isfinite(total).all():
        raise PruningError(
            f"criterion {type(criterion).__name__} gave a score that is not a finite number in "
            f"group {group!r}; do its weights or gradients hold NaN or infinity?"
        )
    mean = total.mean()
    return total / mean if mean > 0 else total


def gradient_of(name: str, weight: Tensor, criterion: Criterion) -> Tensor | None:
    """The weight's gradient, where the criterion needs it."""
    if "gradient" not in criterion.needs:
        return None
    if weight.grad is None:
        raise PruningError(
            f"criterion {type(criterion).__name__} needs gradients, but {name} has none: pass "
            "data= and loss=, or unfreeze the layer (requires_grad), or choose a criterion "
            "without data such as 'l1'"
        )
    return weight.grad.detach()


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def scores_over_batches(
    model: nn.Module,
    coupling: Any,
    criterion: Criterion,
    batches: Iterable[Any],
    loss: Loss,
    count: int,
    score: Callable[[nn.Module, Any, Criterion], dict[str, Tensor]] = group_scores,
) -> dict[str, Tensor]:
    """`score` averaged over the gradients of `count` batches; the model is not changed.

    Raises:
        PruningError: there is no batch.
    """
    totals: dict[str, Tensor] = {}
    used = 0
    with _untouched(model):
        for batch in islice(batches, count):
            used += 1
            model.zero_grad(set_to_none=True)
            loss(model, batch).backward()
            for name, values in score(model, coupling, criterion).items():
                totals[name] = totals.get(name, 0.0) + values
    if not totals:
        raise PruningError("the criterion needs gradients, but the data gave no batch")
    return {name: total / used for name, total in totals.items()}


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and nothing frozen inside; flags and gradients as before afterwards."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for parameter in frozen:
            parameter.requires_grad_(False)
