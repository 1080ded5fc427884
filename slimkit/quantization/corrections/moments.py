"""Second moments of what a layer's outputs read: all that a change of its weights depends on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 2**24
"""Values of unfolded inputs at a time: 64 MB."""

POSITIONS = 2**17
"""Of a layer's output, drawn from all samples, that the moments are taken over."""


def moments(
    op: str, arguments: dict[str, Any], target: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Moments of one layer's inputs, and their products with what it should give.

    With rounded weights w (groups, out / groups, width) the mean squared distance from the target
    is ``sum((w @ second - 2 * cross) * w)`` plus a constant.

    Args:
        op: ``linear``, ``conv1d`` or ``conv2d``.
        arguments: of the layer's call, by name; its bias is taken off the target.
        target: the layer's output as it should be.
        generator: draws the positions where there are more than `POSITIONS`.

    Returns:
        second: mean of x xT, (groups, width, width); the width is in / groups * kernel.
        cross: mean of y xT, (groups, out / groups, width).
    """
    weight, bias = arguments["weight"], arguments.get("bias")
    groups, width = int(arguments.get("groups", 1)), weight[0].numel()
    second = weight.new_zeros(groups, width, width)
    cross = weight.new_zeros(groups, len(weight) // groups, width)
    part = min(1.0, POSITIONS * len(weight) / max(1, target.numel()))
    count = 0
    for x, y in _rows(op, arguments, target, groups):
        if part < 1:
            drawn = torch.randint(x.shape[1], (math.ceil(part * x.shape[1]),), generator=generator)
            x, y = x[:, drawn.to(x.device)], y[:, drawn.to(x.device)]
        if bias is not None:
            y = y - bias.view(groups, 1, -1)
        second += x.mT @ x
        cross += y.mT @ x
        count += x.shape[1]
    return second / max(1, count), cross / max(1, count)


def _rows(
    op: str, arguments: dict[str, Any], target: Tensor, groups: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What output positions read, (groups, n, width), and give, (groups, n, out / groups)."""
    x, weight = arguments["input"], arguments["weight"]
    if op == "linear":
        yield x.reshape(1, -1, x.shape[-1]), target.reshape(1, -1, target.shape[-1])
        return
    dims = int(op[-2])
    x = functional.pad(x, _padding(arguments, weight))
    if x.dim() == dims + 1:  # one sample without a batch's dimension
        x, target = x[None], target[None]
    sizes = [_sizes(arguments.get(name, 1), dims) for name in ("dilation", "stride")]
    if dims == 1:
        x, target, weight = x.unsqueeze(-2), target.unsqueeze(-2), weight.unsqueeze(-2)
        sizes = [(1, *size) for size in sizes]
    places = target[0, 0].numel()
    step = max(1, CHUNK // (weight[0].numel() * groups * places))

    def by_group(t: Tensor) -> Tensor:
        return t.reshape(len(t), groups, -1, places).permute(1, 0, 3, 2).flatten(1, 2)

    for some, made in zip(x.split(step), target.split(step), strict=True):
        read = functional.unfold(some, weight.shape[2:], sizes[0], 0, sizes[1])
        yield by_group(read), by_group(made)


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    """One size a dimension, of a number or a tuple."""
    values = value if isinstance(value, tuple | list) else (value,)
    return tuple(int(v) for v in values) * (dims // len(values))


def _padding(arguments: dict[str, Any], weight: Tensor) -> list[int]:
    """Zeros around the input, as functional.pad takes them: the last dimension first."""
    kernel, dims = weight.shape[2:], weight.dim() - 2
    padding = arguments.get("padding", 0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        dilation = _sizes(arguments.get("dilation", 1), dims)
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(p, p) for p in _sizes(padding, dims)]
    return [p for pair in reversed(pairs) for p in pair]
