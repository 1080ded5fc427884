"""How channels pass through operations that only move values: joins, splits, views, pads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from slimkit.pruning.identities import ANY, FIXED, Ids, fixed, is_free, stretching, varies
from slimkit.pruning.propagation import (
    Dims,
    NotFollowedError,
    Propagation,
    Rule,
    argument,
    option,
    shape_of,
)


def cat(walk: Propagation, node: fx.Node, name: str) -> Any:
    parts = [walk.dims(part) for part in argument(node, 0, "tensors")]
    tensors = [part for part in parts if part]
    deep = max(len(part) for part in tensors)
    # an empty tensor of one dimension may be joined to any other
    tensors = [part for part in tensors if len(part) == deep or len(part[0])]
    d = (argument(node, 1, "dim") or 0) % len(tensors[0])
    out = list(tensors[0])
    for other in tensors[1:]:
        for k, dim in enumerate(other):
            if k != d:
                out[k] = walk.ids.tie(out[k], dim, f"{name} beside a constant")
    joined = np.concatenate([part[d] for part in tensors])
    out[d] = np.where(joined == ANY, FIXED, joined)  # how far it was stretched is a constant
    return out


def stack(walk: Propagation, node: fx.Node, name: str) -> Any:
    tensors = [walk.dims(part) for part in argument(node, 0, "tensors")]
    first = list(tensors[0] or [])
    for other in tensors[1:]:
        first = [walk.ids.tie(a, b, name) for a, b in zip(first, other or [], strict=True)]
    d = (argument(node, 1, "dim") or 0) % (len(first) + 1)
    return [*first[:d], fixed(len(tensors)), *first[d:]]


def chunk(walk: Propagation, node: fx.Node, name: str) -> Any:
    """Equal parts: the k-th channels of all parts go together, so that they stay equal."""
    return _parts(walk, node, name, argument(node, 2, "dim") or 0)


def _parts(walk: Propagation, node: fx.Node, name: str, dim: int) -> Any:
    x = walk.tensor(node, 0)
    d = dim % len(x)
    sizes = [t.shape[d] for t in node.meta["val"]]
    bounds = np.cumsum(sizes)[:-1]
    parts = np.split(x[d], bounds)
    if is_free(x[d]):
        if name != "chunk":
            walk.doubt(x[d], [len(x[d]), *sizes])
        if len(set(sizes)) == 1:
            walk.ids.tie_rows(np.stack(parts), f"{name} into equal parts")
        else:
            walk.ids.freeze(x[d], f"{name} into parts of different size")
    return tuple([*x[:d], part, *x[d + 1 :]] for part in parts)


def unbind(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    d = (argument(node, 1, "dim") or 0) % len(x)
    walk.ids.freeze(x[d], name)
    return tuple([*x[:d], *x[d + 1 :]] for _ in node.meta["val"])


def slice_(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    d = (argument(node, 1, "dim") or 0) % len(x)
    start, end, step = (argument(node, p, "") for p in (2, 3, 4))
    part = x[d][slice(start, end, step)]
    if len(part) != len(x[d]):
        walk.ids.freeze(x[d], f"{name} at a constant")
    return [*x[:d], part, *x[d + 1 :]]


def select(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    d = (argument(node, 1, "dim") or 0) % len(x)
    walk.ids.freeze(x[d], f"{name} at a constant")
    return [*x[:d], *x[d + 1 :]]


def index(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, indices = walk.tensor(node, 0), node.args[1]
    if not isinstance(indices, list | tuple):
        raise NotFollowedError("no indices")
    for looked_up in indices:
        walk.freeze(walk.dims(looked_up) or [], "positions are looked up by it")
    used = [d for d, index in enumerate(indices) if index is not None]
    for d in used:
        walk.ids.freeze(x[d], "positions are looked up in it")
    if used != list(range(used[0], used[0] + len(used))):
        raise NotFollowedError("indices in several places")
    rest = len(x) - len(used)
    shape = shape_of(node)
    made = [fixed(size) for size in shape[used[0] : len(shape) - (rest - used[0])]]
    return [*x[: used[0]], *made, *x[used[0] + len(used) :]]


def roll(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, dims = walk.tensor(node, 0), argument(node, 2, "dims")
    for d in range(len(x)) if not dims else [dims] if isinstance(dims, int) else dims:
        walk.ids.freeze(x[d], name)
    return list(x)


def flip(walk: Propagation, node: fx.Node, name: str) -> Any:
    out = list(walk.tensor(node, 0))
    for d in argument(node, 1, "dims"):
        out[d] = out[d][::-1]
    return out


def pad(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, amounts = walk.tensor(node, 0), argument(node, 1, "pad")
    out = list(x)
    constant = option(node, "mode") in (None, "constant")
    for k in range(len(amounts) // 2):
        d, (before, after) = len(x) - 1 - k, amounts[2 * k : 2 * k + 2]
        if before < 0 or after < 0 or not (constant or before == after == 0):
            walk.ids.freeze(out[d], "cropped by a constant" if constant else "padded by its mirror")
            out[d] = fixed(shape_of(node)[d])
        else:
            out[d] = np.concatenate([fixed(before), out[d], fixed(after)])
    return out


def permute(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, order = walk.tensor(node, 0), argument(node, 1, "dims")
    return [x[d] for d in order]


def movedim(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, a, b = walk.tensor(node, 0), argument(node, 1, ""), argument(node, 2, "")
    sources = [d % len(x) for d in ([a] if isinstance(a, int) else a)]
    targets = [d % len(x) for d in ([b] if isinstance(b, int) else b)]
    rest = iter(d for d in range(len(x)) if d not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return [x[placed[d]] if d in placed else x[next(rest)] for d in range(len(x))]


def transpose(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    out = list(x)
    default = (-2, -1) if name == "mT" else (0, -1)
    a, b = (argument(node, 1, ""), argument(node, 2, "")) if len(node.args) > 2 else default
    out[a], out[b] = out[b], out[a]
    return out


def expand(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, shape = walk.tensor(node, 0), shape_of(node)
    offset = len(shape) - len(x)
    out: Dims = [stretching(size) for size in shape]
    for d, dim in enumerate(x, start=offset):
        out[d] = walk.broadcast(out[d], dim, name)
    return out


def repeat(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, times = walk.tensor(node, 0), list(argument(node, 1, "repeats"))
    padded = [fixed(1)] * (len(times) - len(x)) + list(x)
    times = [1] * (len(x) - len(times)) + times
    return [np.tile(dim, n) for dim, n in zip(padded, times, strict=True)]


def repeat_interleave(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, times, d = walk.tensor(node, 0), option(node, "repeats"), option(node, "dim")
    if not isinstance(times, int) or d is None:
        raise NotFollowedError("not the same for every position")
    out = list(x)
    out[d] = np.repeat(x[d], times)
    return out


def unsqueeze(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    d = argument(node, 1, "dim") % (len(x) + 1)
    return [*x[:d], fixed(1), *x[d:]]


def pixel_shuffle(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, factor = walk.tensor(node, 0), option(node, "upscale_factor")
    rows = x[-3].reshape(-1, factor * factor)
    out = walk.ids.tie_rows(rows.T, name)
    return [*x[:-3], out, *[fixed(size) for size in shape_of(node)[-2:]]]


def pixel_unshuffle(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, factor = walk.tensor(node, 0), option(node, "downscale_factor")
    out = np.repeat(x[-3], factor * factor)
    return [*x[:-3], out, *[fixed(size) for size in shape_of(node)[-2:]]]


def channel_shuffle(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, groups = walk.tensor(node, 0), option(node, "groups")
    rows = x[1].reshape(groups, -1)
    walk.ids.tie_rows(rows, name)
    return [x[0], rows.T.reshape(-1), *x[2:]]


def glu(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    dim = argument(node, 1, "dim")
    d = (-1 if dim is None else dim) % len(x)
    half = len(x[d]) // 2
    return [*x[:d], walk.ids.tie(x[d][:half], x[d][half:], name), *x[d + 1 :]]


def view(walk: Propagation, node: fx.Node, name: str) -> Any:
    """Merge and split dimensions, block by block of equal product."""
    x = walk.tensor(node, 0)
    shape, open_ = shape_of(node), _left_open(node, len(x))
    out: Dims = []
    for before, after in _blocks([len(dim) for dim in x], shape):
        follows = after.index(open_) if open_ in after else None
        as_heads = node in walk.head_views and len(after) > 1
        if as_heads:
            follows = len(after) - 2  # heads are in front of their dimensions
        dims, sizes = [x[d] for d in before], [shape[d] for d in after]
        made = _reshaped(walk, dims, sizes, name, follows, as_heads=as_heads)
        out += made
        kept = len(dims) == len(sizes) == 1
        if kept and (after[0] == open_ or name not in ("view", "reshape", "_unsafe_view")):
            continue  # no size is written down for it
        varying = [len(dim) for dim in [*dims, *made] if is_free(dim)]
        for dim in dims:
            if is_free(dim) and (kept or len(dim) > 1):
                walk.doubt(dim, varying)
    return out


def _left_open(node: fx.Node, dims: int) -> int | None:
    """The dimension of the result whose size the code leaves open with -1."""
    if option(node, "sizes") is not None:  # unflatten
        asked, start = option(node, "sizes"), option(node, "dim") % dims
    else:
        asked, start = option(node, "size") or option(node, "shape") or [], 0
    return start + list(asked).index(-1) if -1 in asked else None


def _reshaped(
    walk: Propagation,
    dims: Dims,
    sizes: list[int],
    name: str,
    follows: int | None,
    *,
    as_heads: bool,
) -> Dims:
    if len(dims) == len(sizes) == 1:
        return dims
    for dim in dims:
        if len(dim) == 1:
            walk.ids.freeze(dim, f"{name} of a single channel")
    long = [dim for dim in dims if len(dim) > 1]
    big = [k for k, size in enumerate(sizes) if size > 1]
    free = varies(long)

    def along(parts: dict[int, Ids]) -> Dims:
        return [parts.get(k, fixed(size)) for k, size in enumerate(sizes)]

    if not free:
        return along({})
    if len(long) == 1:
        parts = [long[0]] if len(big) == 1 else walk.ids.split(long[0], [sizes[k] for k in big])
        if parts is not None:
            return along(dict(zip(big, parts, strict=True)))
    if len(free) > 1:
        reason = f"{name} merges several dimensions of channels"
        if len(big) == 1:
            return along({big[0]: walk.ids.merge(long, reason)})
        walk.freeze(long, reason)
        return along({})
    channel = long[free[0]]
    inner = math.prod(len(dim) for dim in long[free[0] + 1 :])
    one = np.repeat(channel, inner)
    lattice = np.tile(one, math.prod(sizes) // len(one)).reshape(sizes)
    for k in big:  # the channels may lie along one of the new dimensions alone
        rows = np.moveaxis(lattice, k, -1).reshape(-1, sizes[k])
        if (rows == rows[0]).all():
            return along({k: rows[0]})
    # The channels are split: the same positions of all parts go together, as in attention heads
    # and channel shuffles, or whole parts do, where the code says so or makes pairs;
    # verification tells whether the user's code allows it.
    if len(long) == 1:
        pairs = len(big) == 2 and sizes[big[1]] == 2 < sizes[big[0]]
        part = big[0] if follows is None and pairs else follows
        if part in big[:-1] and (len(big) == 2 or as_heads):
            rows = np.moveaxis(lattice, part, -1).reshape(-1, sizes[part])
            return along({part: walk.ids.tie_rows(rows, name)})
    last = big[-1]
    whole = sizes[last] // inner
    if sizes[last] % inner or len(channel) % whole:
        walk.freeze(dims, f"{name} mixes channels with other dimensions")
        return along({})
    return along({last: walk.ids.tie_rows(lattice.reshape(-1, sizes[last]), name)})


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions with equal products on both sides, as short as possible.

    >>> _blocks([2, 3, 4], [6, 4])
    [([0, 1], [0]), ([2], [1])]
    """
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = ([i] if i < len(before) else []), ([j] if j < len(after) else [])
        i, j = i + len(left), j + len(right)
        while True:
            a, b = math.prod(before[d] for d in left), math.prod(after[d] for d in right)
            if a == b:
                break
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        blocks.append((left, right))
    return blocks


RULES: dict[str, Rule] = {
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), chunk),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT"), transpose),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    **dict.fromkeys(("repeat", "tile"), repeat),
    **dict.fromkeys(
        ("view", "_unsafe_view", "view_as", "reshape", "reshape_as", "ravel", "flatten"), view
    ),
    **dict.fromkeys(("unflatten", "squeeze"), view),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    "permute": permute,
    "repeat_interleave": repeat_interleave,
    "cat": cat,
    "stack": stack,
    "unbind": unbind,
    "slice": slice_,
    "select": select,
    "index": index,
    "roll": roll,
    "flip": flip,
    "unsqueeze": unsqueeze,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "glu": glu,
}
