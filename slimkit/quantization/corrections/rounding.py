"""Adaptive rounding: takes each weight up or down, whichever keeps its layer's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.calls import Call, trace
from slimkit.progress import track
from slimkit.quantization.corrections.beside import HELD, Meet, beside
from slimkit.quantization.corrections.moments import moments
from slimkit.quantization.corrections.places import Place, named, rounded_places
from slimkit.quantization.fake import FakeQuantization, Fixed

DAMPING = 0.01
"""How much a weight's own distance counts beside the outputs', as a share of the mean moment."""

LEAST = 1e-6
"""A turn must gain this share of the row's distance: less is the error of float32."""


def rounding_(
    model: nn.Module,
    reference: nn.Module,
    fake: FakeQuantization,
    inputs: tuple[Any, ...],
    *,
    seed: int = 0,
) -> dict[str, str]:
    """Replace each weight of `model` by one of its two neighbours on the grid.

    In order, each layer's integers are chosen so that with them, on rounded inputs, the layer
    comes closest to what it gives in float: the problem of Nagel et al. 2020, Up or Down? Adaptive
    Rounding for Post-Training Quantization, https://arxiv.org/abs/2004.10568, with the float
    network's outputs as the target and without the activation function. That squared distance is a
    quadratic form in the weights, known exactly once the second moments of the inputs are. So it is
    not relaxed and learned from samples as in the paper: starting from the nearest integers, in
    each output channel the weight that gains most is turned, until none gains. This has no learning
    rate and no number of steps to set, never ends above where it started, and takes one pass over
    the data.

    Memory: one forward; 256 MB of float outputs; 64 MB of unfolded inputs; the moments of one
    layer, 256 MB at most.

    Args:
        model: its weights are changed to values on their grids.
        reference: the same model in float.
        fake: rounds; a weight's quantizer that would find another range for the new weights gives
            way to a fixed one.
        inputs: the forward's arguments, one batch.
        seed: of the output positions that are drawn where there are more than the moments need.

    Returns:
        Layer -> why it was left out.
    """
    skipped: dict[str, str] = {}
    wanted: list[Place] = []
    for place in rounded_places(trace(model, inputs), fake.sites):
        reason = _obstacle(place, model)
        if reason:
            skipped[place.layer] = reason
        else:
            wanted.append(place)
    bar = iter(track(wanted, "choosing integers"))
    generator = torch.Generator().manual_seed(seed)
    by_call = {place.call.name: place for place in wanted}

    def chosen(call: Call, target: Tensor) -> Meet:
        weight = model.get_parameter(by_call[call.name].weight)

        def meet(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            found = moments(call.op, named(call.op, args, kwargs), target, generator)
            values = _choose_(weight, fake, fake.sites.weights[call.name][0], *found)
            next(bar, None)
            return func(args[0], values, *args[2:], **kwargs)  # as a simulation passes them

        return meet

    beside(model, reference, fake, inputs, [place.call for place in wanted], chosen)
    next(bar, None)
    return skipped


def _obstacle(place: Place, model: nn.Module) -> str:
    """Why a layer's integers cannot be chosen; empty if they can."""
    op, weight = place.call.op, model.get_parameter(place.weight)
    if op not in ("conv1d", "conv2d", "linear"):
        return f"the moments of {op} are not known"
    if not place.once:
        return "its weights, bias or batch-norm serve several calls"
    groups = 1 if op == "linear" else place.call.arguments.get(6, 1)
    groups = int(place.call.arguments.get("groups", groups))
    width = weight[0].numel()
    if groups * width**2 > HELD:
        return f"each output reads {width} values, whose moments would take over 256 MB"
    return ""


def _choose_(
    weight: Tensor, fake: FakeQuantization, name: str, second: Tensor, cross: Tensor
) -> Tensor:
    """Set `weight` to the chosen values and see that its quantizer `name` gives their integers."""
    fake.fit_weight_(name, weight)
    quantizer = fake[name]
    grid = quantizer.grid
    scale, zero_point = quantizer.qparams()
    step = grid.spread(scale, weight).expand_as(weight).reshape(cross.shape)
    zero = grid.spread(zero_point, weight).expand_as(weight).reshape(cross.shape)
    exact = weight.detach().float().reshape(cross.shape) / step
    steps = settle(exact, step, second, cross, grid.qmin - zero, grid.qmax - zero)
    chosen = (steps * step).reshape(weight.shape)
    integers = (steps + zero).reshape(weight.shape)
    weight.data.copy_(chosen)
    fake.fit_weight_(name, weight)
    new_scale, new_zero_point = quantizer.qparams()
    same = torch.allclose(new_scale, scale, rtol=1e-5, atol=0)
    if not (same and torch.equal(grid.quantize(weight, new_scale, new_zero_point), integers)):
        fixed = Fixed(grid).to(weight.device)
        fixed.scale.copy_(scale)
        fixed.zero_point.copy_(zero_point)
        fake.quantizers[name] = fixed
    return fake[name](weight.detach())


def settle(
    exact: Tensor, step: Tensor, second: Tensor, cross: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Whole numbers of steps, each the one below or above `exact`, that suit the moments best.

    Args:
        exact: the weights in steps, (groups, rows, width).
        step: the size of each weight's step, same shape.
        second: as `moments` gives it.
        cross: as `moments` gives it.
        low: the fewest steps that the grid has, same shape as `exact`.
        high: the most.
    """
    width = exact.shape[-1]
    damp = DAMPING * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    second = second + damp * torch.eye(width, device=second.device)
    cross = cross + damp * (exact * step)
    diagonal = second.diagonal(dim1=1, dim2=2)[:, None]  # (groups, 1, width)
    nearest = torch.minimum(torch.maximum(exact.round(), low), high)
    other = torch.where(nearest > exact, nearest - 1, nearest + 1)
    # the largest weights stay, so that they span the same range
    free = (other >= low) & (other <= high) & (exact > low + 0.5) & (exact < high - 0.5)
    free &= exact != 0  # what pruning has zeroed stays zero
    turn = torch.where(free, (other - nearest) * step, torch.zeros_like(step))
    turned = torch.zeros_like(exact, dtype=torch.bool)
    slope = (nearest * step) @ second - cross
    least = LEAST * (turn.square() * diagonal).sum(-1, keepdim=True)
    group = torch.arange(len(exact), device=exact.device)[:, None]
    for _ in range(2 * width):
        gain = -turn * (2 * slope + turn * diagonal)
        most, at = gain.max(-1, keepdim=True)  # (groups, rows, 1)
        taken = torch.where(most > least, turn.gather(-1, at), torch.zeros_like(most))
        if not taken.any():
            break
        slope += taken * second[group, at.squeeze(-1)]
        turn.scatter_(-1, at, torch.where(taken != 0, -taken, turn.gather(-1, at)))
        turned.scatter_(-1, at, turned.gather(-1, at) ^ (taken != 0))
    return torch.where(turned, other, nearest)
