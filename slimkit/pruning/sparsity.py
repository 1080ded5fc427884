"""Zero weights: which may be zero, their masks while a model trains, and zeroing at once.

A network with zero weights is as large and as fast as before: no backend here computes them faster
than others. Its files compress better, and runtimes that know a pattern may use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from slimkit.batches import Inputs, fresh, inputs_of
from slimkit.errors import PruningError, did_you_mean
from slimkit.evaluating import evaluating
from slimkit.interfaces import Criterion
from slimkit.pruning.analysis import COLOURS
from slimkit.pruning.cost import macs, parameters, size_mb
from slimkit.pruning.granularity import Fine, M, N, choose
from slimkit.pruning.patterns import check_pattern, covers
from slimkit.pruning.report import PruningReport
from slimkit.pruning.scores import Loss, score_of, scores_over_batches
from slimkit.pruning.selection import FIRST
from slimkit.pruning.statistics import Measured
from slimkit.pruning.targets import Target

DEPTHWISE = "depthwise: it has few weights, and needs them"
COMPUTED = "its weight is computed of other parameters"
OTHER = "no weight of a convolution or linear layer"


@dataclass(frozen=True)
class Weights:
    """The weights that may become zero.

    Args:
        axes: parameter name to its input dimension.
        whole: layer or parameter name to the reason why it is left as it is.
        granularity: what becomes zero as a whole.
    """

    axes: dict[str, int]
    whole: dict[str, str]
    granularity: Fine

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: tuple[Any, ...],
        granularity: Fine,
        protect: Sequence[str] = (),
        protect_first: bool = True,
    ) -> Weights:
        """Find the convolutions and linear layers whose weights may become zero.

        Depthwise convolutions stay whole, as in Elsen et al. 2019, Fast Sparse ConvNets,
        https://arxiv.org/abs/1911.09723, and so does the first convolution over an image or a
        signal where `protect_first` says so and other layers are left.

        Raises:
            PruningError: there is none, a pattern names no layer, or 2:4 does not fit a layer.
        """
        for pattern in protect:
            check_pattern("protect", pattern, model)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)}
        reasons = {name: _reason(name, layer, protect) for name, layer in layers.items()}
        whole = {name: reason for name, reason in reasons.items() if reason}
        found = {name: layer for name, layer in layers.items() if name not in whole}
        first = _first_convolution(model, inputs) if protect_first else None
        spared = {name: FIRST for name, layer in found.items() if layer is first}
        if len(found) > len(spared):
            whole |= spared
        holders: dict[int, str] = {}  # tied weights are zero in all layers at once
        for name, layer in found.items():
            if name not in whole:
                holders.setdefault(id(layer.weight), name)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner, _, own = name.rpartition(".")
            if parameter.dim() < 2 or any(covers(layer, [owner]) for layer in whole):
                continue
            if id(parameter) not in holders:
                whole[name] = OTHER
            elif owner not in layers or own != "weight":  # a table, say
                tied = holders.pop(id(parameter))
                whole[tied] = f"shares its weight with {owner}"
        axes = {f"{n}.weight".lstrip("."): _input_axis(found[n]) for n in holders.values()}
        if not axes:
            listed = "; ".join(f"{n}: {r}" for n, r in list(whole.items())[:8]) or "no layer"
            raise PruningError(f"nothing can be pruned: {listed}")
        if granularity == "2:4":
            _check_fours(model, axes)
        return cls(axes, whole, granularity)


def _reason(name: str, layer: nn.Module, protect: Sequence[str]) -> str:
    """Why a layer is left as it is; empty if it is not."""
    pattern = next((p for p in protect if covers(p, [name])), None)
    if pattern is not None:
        return f"protected by {pattern!r}"
    if layer._parameters.get("weight") is None:
        return COMPUTED
    depthwise = isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels
    return DEPTHWISE if depthwise else ""


def _input_axis(layer: nn.Module) -> int:
    return 0 if isinstance(layer, _ConvTransposeNd) else 1


def _check_fours(model: nn.Module, axes: Mapping[str, int]) -> None:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    sizes = {name.rpartition(".")[0]: tensors[name].shape[axis] for name, axis in axes.items()}
    unfit = {name: size for name, size in sizes.items() if size % M}
    if unfit:
        listed = ", ".join(f"{name or 'the model'} ({size})" for name, size in unfit.items())
        raise PruningError(
            f"2:4 needs input dimensions that are multiples of {M}, but these are not: {listed}. "
            f"Leave them as they are with protect: [{', '.join(unfit)}]"
        )


def _first_convolution(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module | None:
    """The convolution that runs first, if what it reads has no more channels than an image."""
    order: list[_ConvNd] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _args: order.append(module))
        for module in model.modules()
        if isinstance(module, _ConvNd)
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(*fresh(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return order[0] if order and order[0].in_channels <= COLOURS else None


def check_criterion(criterion: Criterion, granularity: str) -> None:
    """Refuse a criterion that needs what single weights do not have.

    Raises:
        PruningError: it does.
    """
    further = sorted(criterion.needs & {"norm_scale", "activation"})
    if further:
        raise PruningError(
            f"criterion {type(criterion).__name__} needs {', '.join(further)}, by which it scores "
            f"channels, not single weights: choose one such as l1 or taylor for {granularity}"
        )


def weight_scores(
    model: nn.Module,
    weights: Weights,
    criterion: Criterion,
    measured: Mapping[str, Measured] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Importance of each weight as the criterion gives it: parameter name to its own shape.

    Args:
        model: whose weights.
        weights: those that may become zero.
        criterion: scores them.
        measured: as for `slimkit.pruning.scores.group_scores`, as is the next.
        fisher: by weight.

    Raises:
        PruningError: the criterion says nothing of a layer or not of each weight, a gradient is
            missing, or a score is not finite.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    scores = {}
    for name in weights.axes:
        weight = tensors[name]
        score = score_of(model, name, weight, criterion, measured, fisher)
        kind = type(criterion).__name__
        if score is None:
            raise PruningError(
                f"criterion {kind} says nothing about {name}, which lacks what it looks at "
                f"({', '.join(sorted(criterion.needs))}): protect that layer, or choose another "
                "criterion"
            )
        if score.shape != weight.shape:
            raise PruningError(
                f"criterion {kind} scores channels, not single weights: choose one such as l1 or "
                f"taylor for {weights.granularity}"
            )
        if not torch.isfinite(score).all():
            raise PruningError(
                f"criterion {kind} gave a score that is not a finite number in {name}; do its "
                "weights or gradients hold NaN or infinity?"
            )
        scores[name] = score.float()
    return scores


class WeightMasks:
    """Which weights still live.

    Args:
        model: whose weights.
        weights: those that may become zero.
        kept: parameter name to a bool for each weight; left out, all live.
    """

    def __init__(
        self, model: nn.Module, weights: Weights, kept: Mapping[str, Tensor] | None = None
    ) -> None:
        tensors = dict(model.named_parameters(remove_duplicate=False))
        self.weights = weights
        self.kept = {
            name: torch.ones_like(tensors[name], dtype=torch.bool)
            if not kept
            else kept[name].to(tensors[name].device)
            for name in weights.axes
        }

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero the dead weights."""
        tensors = dict(model.named_parameters(remove_duplicate=False))
        for name, kept in self.kept.items():
            tensors[name].masked_fill_(~kept.to(tensors[name].device), 0.0)

    def silence(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scores with dead weights below every living one, so that none comes back."""
        return {name: scores[name].masked_fill(~kept, -1.0) for name, kept in self.kept.items()}

    def sparsity(self) -> dict[str, float]:
        """Parameter name to the fraction of its weights that is zero."""
        return {name: 1 - int(kept.sum()) / kept.numel() for name, kept in self.kept.items()}

    def zeros(self) -> tuple[int, int]:
        """How many weights are zero, and of how many."""
        total = sum(kept.numel() for kept in self.kept.values())
        return total - sum(int(kept.sum()) for kept in self.kept.values()), total

    def report(self, model: nn.Module, inputs: tuple[Any, ...]) -> PruningReport:
        """What was zeroed; it composes with an earlier cut of channels."""
        cost, count, size = macs(model, inputs), parameters(model), size_mb(model)
        earlier = getattr(model, "slimkit_pruning", None)
        return PruningReport(
            groups=earlier.groups if earlier else {},
            frozen=self.weights.whole,
            macs=(earlier.macs[0] if earlier else cost, cost),
            parameters=(earlier.parameters[0] if earlier else count, count),
            size_mb=(earlier.size_mb[0] if earlier else size, size),
            kept=earlier.kept if earlier else {},
            attributes=earlier.attributes if earlier else {},
            weights={n: (kept.numel(), int(kept.sum())) for n, kept in self.kept.items()},
        )


def ratio_of(
    granularity: str, target: Mapping[str, float] | None, about_channels: Sequence[str] = ()
) -> float:
    """The fraction of the weights that becomes zero.

    Args:
        granularity: what becomes zero as a whole.
        target: ``{"ratio": 0.8}``, or None for 2:4.
        about_channels: options that were given and only channels have.

    Raises:
        PruningError: there is no such granularity, another target is given, or such an option.
    """
    known = get_args(Fine)
    if granularity not in known:
        hint = did_you_mean(granularity, ["channel", *known])
        raise PruningError(f"no granularity is called {granularity!r}{hint}")
    if about_channels:
        raise PruningError(
            f"{', '.join(about_channels)}: about channels; leave it out with granularity "
            f"{granularity}"
        )
    if granularity == "2:4":
        if target is not None:
            raise PruningError("2:4 zeroes half of the weights, always: leave the target out")
        return N / M
    aim = Target.of(target or {})
    if aim.measure != "ratio":
        raise PruningError(
            f"granularity {granularity} needs a ratio, the fraction of the weights that is zero, "
            f'such as {{"ratio": 0.8}}; not {aim}'
        )
    return aim.value


def zero_(
    model: nn.Module,
    inputs: tuple[Any, ...],
    criterion: Criterion,
    granularity: Fine,
    *,
    ratio: float,
    ranking: str = "global",
    max_ratio: float | Sequence[float] | None = None,
    block_size: tuple[int, int] = (1, 4),
    protect: Sequence[str] = (),
    protect_first: bool = True,
    batches: Iterable[Any] = (),
    loss: Loss,
    count: int = 8,
    inputs_in: Inputs = inputs_of,
) -> PruningReport:
    """Zero the weights of `model` that score least, in place; the report stays with the model.

    Args:
        model: is changed.
        inputs: the forward's arguments.
        criterion: scores weights.
        granularity: what becomes zero as a whole.
        ratio: fraction of the weights that may become zero; 0.5 for 2:4.
        ranking: see `slimkit.pruning.granularity.choose`, as for the next two.
        max_ratio: of one tensor.
        block_size: rows and columns of a block.
        protect: name patterns of layers that stay as they are.
        protect_first: whether the first convolution over an image or a signal does.
        batches: for a criterion that needs data.
        loss: to differentiate.
        count: how many batches.
        inputs_in: takes the forward's arguments out of a batch.

    Raises:
        PruningError: no weight may be zero, an option does not fit, or the ratio is out of reach.
    """
    check_criterion(criterion, granularity)
    weights = Weights.of(model, inputs, granularity, protect, protect_first)
    scores = scores_over_batches(
        model, weights, criterion, batches, loss, count, weight_scores, inputs_in
    )
    options = {"ranking": ranking, "max_ratio": max_ratio, "block_size": block_size}
    kept = choose(scores, weights.axes, granularity, ratio, **options)  # type: ignore[arg-type]
    masks = WeightMasks(model, weights, kept)
    if not masks.zeros()[0]:
        raise PruningError(
            f"nothing was pruned: {ratio:g} of the weights is less than one {granularity}"
        )
    masks.apply_(model)
    report = masks.report(model, inputs)
    model.slimkit_pruning = report  # type: ignore[assignment]  # a plain attribute, not a module
    return report
