"""A focus stem, slices of the image side by side as channels, becomes one strided convolution.

The slices are found by what they do, not by how they are written: the positions of the image are
sent through them, and what comes out must be its blocks of b x b pixels as b b channels each. A
k x k convolution of stride s over those is one of b k x b k and stride b s over the image, with the
same products (YOLOv5 wrote its stem anew that way).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.calls import Call, Trace
from slimkit.quantization.corrections.beside import run
from slimkit.rewriting.changes import Change, Focus
from slimkit.rewriting.found import Found, here, owner, traced

_MOVES = frozenset(
    {
        "cat",
        "chunk",
        "contiguous",
        "flatten",
        "getitem",
        "movedim",
        "narrow",
        "permute",
        "pixel_unshuffle",
        "reshape",
        "split",
        "stack",
        "transpose",
        "unflatten",
        "view",
    }
)
"""Operations that only move values to other places."""


def focus_to_conv(model: nn.Module, inputs: tuple[Any, ...]) -> Found:
    """Convolutions that read blocks of pixels as channels read the pixels themselves.

    Args:
        model: not changed.
        inputs: the forward's arguments.
    """
    calls = traced(model, inputs)
    changes: list[Change] = []
    left: dict[str, str] = {}
    for conv in calls.calls:
        if conv.op != "conv2d" or conv.weight_path is None:
            continue
        chain = _moves_before(conv, calls)
        blocks = _blocks(model, inputs, chain, conv) if chain else None
        if blocks is None:
            continue
        path = conv.weight_path.removesuffix(".weight")
        reason = _obstacle(model, inputs, chain, conv, calls)
        if reason:
            left[path] = reason
            continue
        where = owner(chain[0])
        changes.append(Focus(path, where, here(chain[0]), here(chain[-1]), *blocks))
    return Found(changes, left)


def _moves_before(conv: Call, calls: Trace) -> list[Call]:
    """The calls, in order, that move what one tensor holds to what `conv` reads; or none."""
    makers = {number: call for call in calls.calls for number in call.outputs}
    wanted, sources = [conv.inputs[0]], set()
    chain: dict[str, Call] = {}
    while wanted:
        number = wanted.pop()
        maker = makers.get(number)
        if maker is None or maker.op not in _MOVES:
            sources.add(number)
        elif maker.name not in chain:
            chain[maker.name] = maker
            wanted += maker.inputs
    return [c for c in calls.calls if c.name in chain] if len(sources) == 1 else []


def _blocks(
    model: nn.Module, inputs: tuple[Any, ...], chain: list[Call], conv: Call
) -> tuple[int, tuple[tuple[int, int, int], ...]] | None:
    """Size of the blocks, and which channel, row and column each channel is; None if it is not."""
    shape: list[int] = []
    made: dict[int, Tensor] = {}
    reached: list[Tensor] = []

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in made:
            return x
        shape[:] = x.shape
        return torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)

    def move(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = torch.utils._pytree.tree_map(place, (args, kwargs))
        out = func(*args, **kwargs)
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                made[id(leaf)] = leaf
        return out

    def take(_func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        reached.append(args[0] if args else kwargs["input"])

    run(model, inputs, {call.name: move for call in chain} | {conv.name: take})
    return _decoded(reached[0], shape) if reached and len(shape) == 4 else None


def _decoded(positions: Tensor, shape: list[int]) -> Any:
    """What `positions` (N, K, h, w) of an image (N, C, H, W) say: see `_blocks`."""
    n, channels, rows, columns = shape
    if positions.dim() != 4 or positions.shape[0] != n or not positions.shape[2]:
        return None
    b = rows // positions.shape[2]
    wanted = (n, channels * b * b, rows // b, columns // b)
    if b < 2 or rows % b or columns % b or positions.shape != wanted:
        return None
    image = torch.arange(n * channels * rows * columns, dtype=torch.float64).reshape(shape)
    order = []
    for k in range(positions.shape[1]):
        first = int(positions[0, k, 0, 0])  # of the first sample, so below C H W
        c, row, column = first // (rows * columns), first // columns % rows, first % columns
        if c >= channels or row >= b or column >= b:
            return None
        if not torch.equal(positions[:, k], image[:, c, row::b, column::b]):
            return None
        order.append((c, row, column))
    return (b, tuple(order)) if len(set(order)) == len(order) else None


def _obstacle(
    model: nn.Module, inputs: tuple[Any, ...], chain: list[Call], conv: Call, calls: Trace
) -> str:
    """Why the convolution cannot take the slices over; empty if it can."""
    module = model.get_submodule(owner(conv))
    readers = calls.readers()[conv.inputs[0]]
    owners = {owner(call) for call in chain}
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return "the convolution is not an nn.Conv2d"
    if [c for c in calls.calls if c.weight_path == conv.weight_path] != [conv]:
        return "the convolution runs more than once"
    if readers != [conv] or conv.inputs[0] in calls.outputs:
        return "others read the slices, too"
    if module.groups != 1 or module.dilation != (1, 1):
        return "the convolution has groups or a dilation"
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return "the convolution pads otherwise than by zeros around the image"
    if len(owners) > 1:
        return f"several modules slice ({', '.join(sorted(owners))})"
    times = _times(model, inputs, owners.pop())
    return f"the module that slices runs {times} times" if times != 1 else ""


@torch.no_grad()
def _times(model: nn.Module, inputs: tuple[Any, ...], path: str) -> int:
    """How often a forward runs the module."""
    count = 0

    def one(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.get_submodule(path).register_forward_pre_hook(one)
    try:
        run(model, inputs, {}, whole=True)
    finally:
        handle.remove()
    return count
