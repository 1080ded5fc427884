"""Turns a criterion's scores of weights into one importance per channel of each group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeGuard, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from slimkit.batches import Inputs, inputs_of, sample_of, samples_in
from slimkit.errors import PluginError, PruningError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Criterion, Layer
from slimkit.progress import track
from slimkit.pruning.coupling import Coupling, Member
from slimkit.pruning.statistics import MEASURED, Measured, measure
from slimkit.registry import blame_for

Loss = Callable[[nn.Module, Any], Tensor]
"""Takes the model and one batch, gives the scalar to differentiate."""

Score = Callable[
    [
        nn.Module,
        Any,
        Criterion,
        Mapping[str, Measured] | None,
        Mapping[str, Tensor] | None,
    ],
    dict[str, Tensor],
]
"""`group_scores`, or its like for what is no group of channels."""


SAMPLES = 32
"""Of each batch, whose gradients are taken one by one for `slimkit.interfaces.Layer.fisher`."""

GRADIENTS = frozenset({"gradient", "fisher"})
"""Fields of `slimkit.interfaces.Layer` that a backward pass fills."""

DATA = MEASURED | GRADIENTS
"""What a criterion may need that only data gives."""


def group_scores(
    model: nn.Module,
    coupling: Coupling,
    criterion: Criterion,
    measured: Mapping[str, Measured] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Importance of each channel: group name to float64 of shape (channels,).

    The criterion's scores are summed over each channel's weights and over all coupled layers, and
    divided by the group's mean, so that groups can be ranked against each other. That helps scores
    of one unit too: ResNet-56 cut at once to half of its MACs by plain changes of the loss had
    41 % accuracy instead of 70 %. Gradients, where the criterion needs them, are taken from the
    parameters' ``.grad``.

    Args:
        model: what the groups are of.
        coupling: the groups.
        criterion: scores their weights.
        measured: by weight, what `slimkit.pruning.statistics.measure` found.
        fisher: by weight, the mean of squared gradients.

    Raises:
        PruningError: a gradient is missing, a score is not finite, or the criterion says nothing
            about a group.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    totals = {g.name: torch.zeros(g.channels, dtype=torch.float64) for g in coupling.groups}
    silent, dead = set(totals), set[str]()
    members: dict[str, list[tuple[str, Member]]] = {}
    for group in coupling.groups:
        for member in group.members:
            members.setdefault(member.tensor, []).append((group.name, member))
    for name, holders in members.items():
        weight = tensors.get(name)
        if weight is None or weight.dim() < 2:
            continue
        norm = next((member.norm for _, member in holders if member.norm), "")
        gamma = tensors.get(f"{norm}.weight")
        try:
            score = score_of(model, name, weight, criterion, measured, fisher, gamma)
        except MissingGradientError:  # a dead layer: others of its groups may tell enough
            dead.update(group_name for group_name, _ in holders)
            continue
        if score is None:
            continue
        for group_name, member in holders:
            if score.shape[member.dim] == 1 < weight.shape[member.dim]:
                continue  # it does not tell these channels apart
            others = [d for d in range(weight.dim()) if d != member.dim]
            sums = score.sum(others, dtype=torch.float64).cpu()
            inside = member.channel >= 0
            totals[group_name].index_add_(0, member.channel[inside], sums[inside])
            silent.discard(group_name)
    if silent:
        name = next(g.name for g in coupling.groups if g.name in silent)
        if name in dead:
            raise without_gradient(f"any layer of {name!r}", criterion)
        raise PruningError(
            f"criterion {type(criterion).__name__} says nothing about the channels of {name!r}, "
            f"which lack what it looks at ({', '.join(sorted(criterion.needs)) or 'weights'}): "
            "protect that layer, or choose another criterion"
        )
    return {name: _normalized(name, total, criterion) for name, total in totals.items()}


def score_of(
    model: nn.Module,
    name: str,
    weight: Tensor,
    criterion: Criterion,
    measured: Mapping[str, Measured] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    gamma: Tensor | None = None,
) -> Tensor | None:
    """What a criterion says of one weight; broadcasts to it as it lies in memory.

    Args:
        model: holds it.
        name: of the weight.
        weight: itself.
        criterion: scores it.
        measured: as for `group_scores`, as is the next.
        fisher: by weight.
        gamma: of the batch-norm that follows.

    Returns:
        None where the layer has not what the criterion needs.

    Raises:
        PruningError: a gradient is missing.
    """
    turned = _Turned.of(model, name)
    data = measured.get(name) if measured is not None else None
    shown = turned.layer(weight.detach())
    squares = None if fisher is None else fisher.get(name)
    if "fisher" in criterion.needs and squares is None:
        raise without_gradient(name, criterion)
    layer = Layer(
        name=name,
        weight=shown,
        gradient=turned.layer(_gradient(name, weight, criterion)),
        norm_scale=_detached(gamma),
        fisher=turned.layer(squares),
        input_norm=None if data is None else data.input_norm(shown),
        activation=None if data is None else data.activation,
    )
    if any(getattr(layer, field) is None for field in criterion.needs):
        return None
    with blame_for("criterion", criterion, f"scoring {name}"):
        found: object = criterion.score(layer)
        if not _broadcasts(found, shown):
            what = f"a score {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise PluginError(
                f"criterion {type(criterion).__name__} gave {what} for {name}, whose weight it "
                f"sees as {tuple(shown.shape)}: each dimension must be 1 or the weight's"
            )
        return turned.back(found, shown)


def _broadcasts(score: object, weight: Tensor) -> TypeGuard[Tensor]:
    """Whether a score tells apart the positions of a weight, or some of its dimensions."""
    if not isinstance(score, Tensor) or score.dim() > weight.dim():
        return False
    sizes = weight.shape[weight.dim() - score.dim() :]
    return all(own in (1, size) for own, size in zip(score.shape, sizes, strict=True))


@dataclass(frozen=True)
class _Turned:
    """How a layer's weight lies in memory: transposed convolutions hold (in, out / groups, ...)."""

    groups: int = 0  # 0: not transposed

    @classmethod
    def of(cls, model: nn.Module, name: str) -> _Turned:
        module = model.get_submodule(name.rpartition(".")[0])
        return cls(module.groups if isinstance(module, _ConvTransposeNd) else 0)

    @overload
    def layer(self, weight: Tensor) -> Tensor: ...
    @overload
    def layer(self, weight: Tensor | None) -> Tensor | None: ...
    def layer(self, weight: Tensor | None) -> Tensor | None:
        """As a criterion sees it: (out, in / groups, ...)."""
        if weight is None or not self.groups:
            return weight
        parts = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return parts.flatten(0, 1)

    def back(self, score: Tensor, weight: Tensor) -> Tensor:
        """Scores as the weight lies in memory, from what broadcasts to the layer's `weight`."""
        score = score.reshape([1] * (weight.dim() - score.dim()) + list(score.shape))
        if not self.groups:
            return score
        if self.groups > 1 or score.shape[0] == 1:
            score = score.expand(weight.shape)
        parts = score.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return parts.flatten(0, 1)


def _normalized(group: str, total: Tensor, criterion: Criterion) -> Tensor:
    if not torch.isfinite(total).all():
        raise PruningError(
            f"criterion {type(criterion).__name__} gave a score that is not a finite number in "
            f"group {group!r}; do its weights or gradients hold NaN or infinity?"
        )
    mean = total.mean()
    return total / mean if mean > 0 else total


def _gradient(name: str, weight: Tensor, criterion: Criterion) -> Tensor | None:
    if "gradient" not in criterion.needs:
        return None
    if weight.grad is None:
        raise without_gradient(name, criterion)
    return weight.grad.detach()


class MissingGradientError(PruningError):
    """A criterion of gradients has none of some tensor."""


def without_gradient(name: str, criterion: Criterion) -> MissingGradientError:
    """That a criterion of gradients has none of the tensor of that name."""
    return MissingGradientError(
        f"criterion {type(criterion).__name__} needs gradients, but the loss gave {name} none: "
        "does the loss depend on it? Protect that layer, or choose a criterion without gradients "
        "such as 'l1'"
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def scores_over_batches(
    model: nn.Module,
    coupling: Any,
    criterion: Criterion,
    batches: Iterable[Any],
    loss: Loss,
    count: int,
    score: Score = group_scores,
    inputs: Inputs = inputs_of,
) -> dict[str, Tensor]:
    """`score`, of `coupling`, with what the criterion needs of data; the model is not changed.

    A criterion that needs no data reads no batch.

    Scores that need gradients are averaged over those of `count` batches. For the Fisher
    information, gradients are taken sample by sample, of at most `SAMPLES` of each batch.

    Raises:
        PruningError: there is no batch.
    """
    given = list(islice(batches, count)) if len(criterion.needs & DATA) > 1 else batches
    found = measure(model, given, count, inputs) if criterion.needs & MEASURED else None
    squares = None
    if "fisher" in criterion.needs:
        squares = fisher_of(model, given, loss, count)
    if "gradient" not in criterion.needs:
        return score(model, coupling, criterion, found, squares)
    totals: dict[str, Tensor] = {}
    used = 0
    with _untouched(model):
        for batch in islice(given, count):
            used += 1
            model.zero_grad(set_to_none=True)
            loss(model, batch).backward()
            scores = score(model, coupling, criterion, found, squares)
            for name, values in scores.items():
                totals[name] = totals.get(name, 0.0) + values
    if not used:
        raise PruningError("the criterion needs gradients, but the data gave no batch")
    return {name: total / used for name, total in totals.items()}


def fisher_of(
    model: nn.Module, batches: Iterable[Any], loss: Loss, count: int
) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of each parameter, by its path.

    This is the diagonal of the empirical Fisher information, by which the Hessian of a trained
    network's loss is approximated. The model is not changed.

    Raises:
        PruningError: there is no batch.
    """
    totals: dict[str, Tensor] = {}
    used = 0
    with _untouched(model):
        for batch in track(islice(batches, count), "measuring Fisher information", count):
            size = samples_in(batch)
            for n in range(min(SAMPLES, size)):
                model.zero_grad(set_to_none=True)
                loss(model, sample_of(batch, n, size)).backward()
                for name, parameter in model.named_parameters(remove_duplicate=False):
                    if parameter.grad is not None:
                        square = parameter.grad.detach().square()
                        totals[name] = totals[name] + square if name in totals else square
                used += 1
    if not used:
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
