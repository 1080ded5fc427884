"""What a pruning criterion promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from slimkit.interfaces import Activation, Layer
from slimkit.testing.promises import Promises, Subject

CRITERION = Promises()

OPTIONAL = {f.name for f in fields(Layer)} - {"name", "weight"}
"""Fields of `Layer` that are there where `needs` names them."""

SHAPES = {
    "linear layer": (2, 2),
    "wider linear layer": (6, 4),
    "depthwise convolution": (4, 1, 3, 3),
    "convolution in one dimension": (5, 3, 3),
    "convolution in two dimensions": (6, 4, 3, 3),
    "grouped convolution (2 groups)": (6, 2, 3, 3),
    "convolution in three dimensions": (4, 3, 2, 2, 2),
}
_PRECISIONS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LayerCase:
    """One layer to score, what to call it, and the optional fields to print."""

    kind: str
    layer: Layer
    needs: frozenset[str]

    def __str__(self) -> str:
        weight = self.layer.weight
        text = f"{self.kind}, weight of shape {tuple(weight.shape)} in {weight.dtype}"
        for field in ("weight", *sorted(OPTIONAL & self.needs)):
            value = getattr(self.layer, field)
            parts = {field: value}
            if isinstance(value, Activation):
                parts = {f"{field}.mean": value.mean, f"{field}.zeros": value.zeros}
            for name, tensor in parts.items():
                if tensor.numel() <= 8:
                    rows = torch.atleast_2d(tensor)
                    text += f"\n{name} = {', '.join(_shown(row) for row in rows)}"
        return text


def layers(subject: Subject) -> Iterator[LayerCase]:
    """Layers of 2 to 5 dimensions with every optional field filled."""
    needs = frozenset(subject.make().needs)
    for seed, (kind, shape) in enumerate(SHAPES.items()):
        yield LayerCase(kind, _layer(shape, seed, grouped="grouped" in kind), needs)


def _layer(shape: tuple[int, ...], seed: int, *, grouped: bool = False) -> Layer:
    """As a trained network has them: weights around 0.002, gradients around 0.001."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def positive(*size: int) -> Tensor:
        return torch.rand(size, generator=generator) + 0.1

    out, fan_in, *kernel = shape
    features = (out if grouped or fan_in == 1 else 1, fan_in, *[1] * len(kernel))
    return Layer(
        name="block.layer.weight",
        weight=0.002 * normal(*shape),
        gradient=0.001 * normal(*shape),
        norm_scale=normal(out),
        fisher=0.001 * positive(*shape),
        input_norm=10 * positive(*features),
        activation=Activation(positive(out), 0.8 * positive(out)),
    )


def mapped(layer: Layer, change: Callable[[Tensor], Tensor]) -> Layer:
    """The layer with `change` made to each of its tensors."""
    values: dict[str, Any] = {}
    for field in ("weight", *OPTIONAL):
        value = getattr(layer, field)
        if isinstance(value, Activation):
            value = Activation(change(value.mean), change(value.zeros))
        elif value is not None:
            value = change(value)
        values[field] = value
    return replace(layer, **values)


def _whole(score: Tensor, layer: Layer) -> Tensor:
    """A score of each weight, in float64."""
    return score.detach().double().expand(layer.weight.shape)


def _far(found: Tensor, expected: Tensor, share: float) -> bool:
    """Whether any value is off by more than `share` of itself and of the mean."""
    allowed = share * (expected.abs() + expected.abs().mean())
    return not bool(((found - expected).abs() <= allowed).all())


def _shown(values: Tensor) -> str:
    """Values, or the first eight of them."""
    few = [float(f"{v:.4g}") for v in values.flatten()[:8].tolist()]
    more = "" if values.numel() <= 8 else f" and {values.numel() - 8} more"
    return f"{few}{more}"


@CRITERION.on(layers)
def scores_broadcast_to_the_weight(subject: Subject, case: LayerCase) -> str | None:
    """Scores are a tensor that broadcasts to layer.weight, from 2-D (linear) to 5-D (conv3d)."""
    score, weight = subject.make().score(case.layer), case.layer.weight
    if not isinstance(score, Tensor):
        return f"a {type(score).__name__} instead of a tensor"
    try:
        score.expand(weight.shape)
    except RuntimeError:
        return f"scores of shape {tuple(score.shape)} for a weight of {tuple(weight.shape)}"
    return None


@CRITERION.on(layers)
def scores_are_finite_and_not_negative(subject: Subject, case: LayerCase) -> str | None:
    """Every score is a finite number of at least 0; what scores least is removed first."""
    score = subject.make().score(case.layer)
    good = torch.isfinite(score) & (score >= 0)
    return None if bool(good.all()) else f"scores {_shown(score)}"


@CRITERION.on(layers)
def scores_are_the_same_again(subject: Subject, case: LayerCase) -> str | None:
    """The same tensors and options give the same scores, whatever the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = subject.make().score(case.layer)
        torch.manual_seed(2)
        criterion = subject.make()
        second, third = criterion.score(case.layer), criterion.score(case.layer)
    for again in (second, third):
        if not torch.equal(first, again):
            return f"scores {_shown(first)} and then {_shown(again)}"
    return None


@CRITERION.on(layers)
def the_layer_is_not_changed(subject: Subject, case: LayerCase) -> str | None:
    """Scoring writes into none of the layer's tensors: they are the model's own."""
    layer = mapped(case.layer, Tensor.clone)
    subject.make().score(layer)
    for field in ("weight", *sorted(OPTIONAL)):
        before, after = getattr(case.layer, field), getattr(layer, field)
        pairs = [(before, after)]
        if isinstance(before, Activation):
            pairs = [(before.mean, after.mean), (before.zeros, after.zeros)]
        for old, new in pairs:
            if not torch.equal(old, new):
                return f"layer.{field} was {_shown(old)} and is now {_shown(new)}"
    return None


@CRITERION.on(layers)
def scores_follow_a_channel_permutation(subject: Subject, case: LayerCase) -> str | None:
    """Permuting the layer's output channels, or its inputs, permutes the scores and nothing else.

    Coupled layers hold the same channel at different places, so a score must not depend on it.
    """
    expected = _whole(subject.make().score(case.layer), case.layer)
    out, fan_in = case.layer.weight.shape[:2]
    for what, dim, size in (("output channels", 0, out), ("inputs", 1, fan_in)):
        order = torch.arange(size).roll(1)

        def moved(x: Tensor, dim: int = dim, order: Tensor = order, size: int = size) -> Tensor:
            per_channel = x.dim() > dim and x.shape[dim] == size
            if dim == 1 and x.dim() == 1:
                return x
            return x.index_select(dim, order) if per_channel else x

        layer = mapped(case.layer, moved)
        found = _whole(subject.make().score(layer), layer)
        if _far(found, expected.index_select(dim, order), 1e-4):
            return (
                f"with {what} in the order {order.tolist()} the scores are {_shown(found)}, "
                f"not {_shown(expected.index_select(dim, order))}"
            )
    return None


@CRITERION.on(layers)
def asks_only_for_what_it_needs(subject: Subject, case: LayerCase) -> str | None:
    """A layer that holds nothing but the fields which `needs` names is scored."""
    criterion = subject.make()
    unknown = sorted(set(criterion.needs) - OPTIONAL)
    if unknown:
        return f"needs names {unknown}, which slimkit.interfaces.Layer does not have"
    absent: dict[str, Any] = dict.fromkeys(OPTIONAL - criterion.needs)
    try:
        criterion.score(replace(case.layer, **absent))
    except (AttributeError, TypeError, AssertionError) as error:
        told = f"{type(error).__name__}: {error}".rstrip(": ")
        return f"{told}; needs = {sorted(criterion.needs)}"
    return None


@CRITERION.on(layers)
def uses_what_it_needs(subject: Subject, case: LayerCase) -> str | None:
    """Every field that `needs` names has a say in the scores; slimkit gathers it from data."""
    criterion = subject.make()
    before = criterion.score(case.layer)
    for field in sorted(criterion.needs & OPTIONAL):
        other = _layer(tuple(case.layer.weight.shape), 99, grouped="grouped" in case.kind)
        layer = replace(case.layer, **{field: getattr(other, field)})
        if torch.equal(before, criterion.score(layer)):
            return f"the same scores {_shown(before)} with another {field}"
    return None


@CRITERION.on(layers)
def half_precision(subject: Subject, case: LayerCase) -> str | None:
    """Scores of float16 and bfloat16 tensors are, to 2 %, those of the same values in float32."""
    for precision in _PRECISIONS:
        halves = mapped(case.layer, lambda x, p=precision: x.to(p))  # type: ignore[misc]
        found = _whole(subject.make().score(halves), halves)
        expected = _whole(subject.make().score(mapped(halves, Tensor.float)), halves)
        if _far(found, expected, 0.02):
            return f"in {precision} {_shown(found)}, in float32 {_shown(expected)}"
    return None


@CRITERION.on(layers)
def all_zero_weights(subject: Subject, case: LayerCase) -> str | None:
    """A layer whose weights are all zero gets finite scores of at least 0."""
    layer = replace(case.layer, weight=torch.zeros_like(case.layer.weight))
    score = subject.make().score(layer)
    good = torch.isfinite(score) & (score >= 0)
    return None if bool(good.all()) else f"scores {_shown(score)} for a weight of zeros"
