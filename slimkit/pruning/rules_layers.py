"""How channels pass through layers with weights: convolutions, products, norms, attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from slimkit.pruning.identities import Ids, fixed, stretching
from slimkit.pruning.propagation import (
    Dims,
    NotFollowedError,
    Propagation,
    Rule,
    argument,
    option,
    shape_of,
)


def convolution(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, w = walk.tensor(node, 0, "input"), walk.tensor(node, 1, "weight")
    groups = argument(node, 8 if name == "convolution" else 6, "groups") or 1
    if name == "convolution" and argument(node, 6, "transposed"):
        raise NotFollowedError("transposed in this form")
    channel = len(x) - len(w) + 1  # 1, or 0 where there is no batch dimension
    incoming, out = x[channel], w[0]
    per_group_in, per_group_out = len(incoming) // groups, len(out) // groups
    if groups == 1:
        walk.ids.tie(incoming, w[1], "a convolution over a fixed input")
    elif per_group_in == 1:  # depthwise: each input channel makes `per_group_out` channels
        walk.ids.tie(np.repeat(incoming, per_group_out), out, "a depthwise convolution")
        if per_group_out > 1:
            _tie_slots(walk, out, groups, per_group_out, by_slot=False)
    else:  # every group must lose as much: the j-th channel of all groups goes together
        _tie_slots(walk, incoming, groups, per_group_in)
        _tie_slots(walk, out, groups, per_group_out)
        walk.ids.tie(incoming[:per_group_in], w[1], "a grouped convolution")
    reads = 1 if groups == 1 or per_group_in > 1 else None
    walk.note(node, argument(node, 1, "weight"), makes=0, reads=reads)
    _bias(walk, node, out)
    return [*x[:channel], out, *[fixed(size) for size in shape_of(node)[channel + 1 :]]]


def transposed_convolution(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, w = walk.tensor(node, 0, "input"), walk.tensor(node, 1, "weight")
    groups = argument(node, 6, "groups") or 1
    channel = len(x) - len(w) + 1
    incoming = walk.ids.tie(x[channel], w[0], "a convolution over a fixed input")
    per_group_in, per_group_out = len(incoming) // groups, len(w[1])
    if groups == 1 or per_group_in > 1:
        _tie_slots(walk, incoming, groups, per_group_in)
        out = np.tile(w[1], groups)
        walk.note(node, argument(node, 1, "weight"), makes=1, reads=0)
    else:  # depthwise: a row of the weight both reads a channel and makes `per_group_out`
        out = np.repeat(incoming, per_group_out)
        walk.ids.freeze(w[1], "a depthwise convolution")
        walk.note(node, argument(node, 1, "weight"), makes=0, reads=None)
    _bias(walk, node, out)
    return [*x[:channel], out, *[fixed(size) for size in shape_of(node)[channel + 1 :]]]


def _tie_slots(
    walk: Propagation, dim: Ids, groups: int, size: int, *, by_slot: bool = True
) -> None:
    rows = dim.reshape(groups, size)
    walk.ids.tie_rows(rows if by_slot else rows.T, "a grouped convolution")


def _bias(walk: Propagation, node: fx.Node, out: Ids) -> None:
    bias = walk.given(node, 2, "bias")
    if bias is not None:
        walk.ids.tie(bias[0], out, "a bias")


def linear(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, w = walk.tensor(node, 0, "input"), walk.tensor(node, 1, "weight")
    walk.ids.tie(x[-1], w[1], "a linear layer over a fixed input")
    walk.note(node, argument(node, 1, "weight"), makes=0, reads=1)
    _bias(walk, node, w[0])
    return [*x[:-1], w[0]]


def addmm(walk: Propagation, node: fx.Node, name: str) -> Any:
    bias, a, b = (walk.tensor(node, i) for i in range(3))
    walk.ids.tie(a[-1], b[0], "a matrix product over a fixed dimension")
    if len(bias[-1]) == len(b[1]):
        walk.ids.tie(bias[-1], b[1], "a bias")
    else:
        walk.stretch(bias[-1], name)
    if len(bias) > 1:
        raise NotFollowedError("a matrix is added")
    walk.note(node, node.args[1], makes=0, reads=1)
    walk.note(node, node.args[2], makes=1, reads=0)
    return [a[0], b[1]]


def matmul(walk: Propagation, node: fx.Node, name: str) -> Any:
    a, b = walk.tensor(node, 0), walk.tensor(node, 1)
    if len(a) < 2 or len(b) < 2:
        raise NotFollowedError("vectors")
    walk.note(node, node.args[0], makes=-2, reads=-1)
    walk.note(node, node.args[1], makes=-1, reads=-2)
    walk.ids.tie(a[-1], b[-2], "a matrix product over a fixed dimension")
    shape = shape_of(node)
    batch: Dims = [stretching(size) for size in shape[:-2]]
    for dims in (a[:-2], b[:-2]):
        for d, dim in enumerate(dims, start=len(batch) - len(dims)):
            batch[d] = walk.broadcast(batch[d], dim, f"{name} over a fixed dimension")
    return [*batch, a[-2], b[-1]]


def attention(walk: Propagation, node: fx.Node, name: str) -> Any:
    q, k, v = (walk.tensor(node, i) for i in range(3))
    walk.ids.tie(q[-1], k[-1], "attention")
    if option(node, "scale") is None:  # then by the size of a head, which changes
        walk.queries.append((q[-1], len(q[-1]) * (len(q[-3]) if len(q) > 3 else 1)))
    walk.ids.tie(k[-2], v[-2], "attention")
    mask = walk.given(node, 3, "attn_mask") or []
    walk.freeze(mask[-2:], "attention is masked by it")
    batch = list(q[:-2])
    for d, dim in enumerate(mask[:-2], start=len(batch) + 2 - len(mask)):
        batch[d] = walk.broadcast(batch[d], dim, "attention")
    for d, dims in enumerate(zip(batch, k, v, strict=False)):
        for dim in dims[1:]:
            each = len(batch[d]) // len(dim)
            if option(node, "enable_gqa") and each > 1:  # several queries read one key
                dim = np.repeat(dim, each)
            batch[d] = walk.broadcast(batch[d], dim, "attention")
    return [*batch, q[-2], v[-1]]


def einsum(walk: Propagation, node: fx.Node, name: str) -> Any:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise NotFollowedError("an equation without an explicit result")
    left, right = equation.replace(" ", "").split("->")
    letters: dict[str, Ids] = {}
    for term, operand in zip(left.split(","), operands, strict=True):  # type: ignore[arg-type]
        for d, (letter, dim) in enumerate(zip(term, walk.dims(operand) or [], strict=True)):
            letters[letter] = walk.ids.tie(letters.get(letter, dim), dim, name)
            kept = letter in right
            walk.note(node, operand, makes=d if kept else None, reads=None if kept else d)
    return [letters[letter] for letter in right]


def embedding(walk: Propagation, node: fx.Node, name: str) -> Any:
    w, index = walk.tensor(node, 0), walk.tensor(node, 1)
    walk.ids.freeze(w[0], "the rows of a table")
    walk.note(node, node.args[0], makes=1, reads=None)
    return [*index, w[1]]


def batch_norm(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0, "input")
    for position in range(1, 5):
        dims = walk.given(node, position)
        if dims is not None:
            walk.ids.tie(dims[0], x[1], "batch-norm over a fixed input")
    if name == "instance_norm" or argument(node, 5, "training"):  # a weight is standardized, say
        walk.normed += [dim for d, dim in enumerate(x) if d != 1]
    for gamma in walk.owners(argument(node, 1, "weight")):
        for weight, _ in walk.makers(node.args[0]):
            walk.norms[weight] = gamma.rpartition(".")[0]
    return list(x)


def layer_norm(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, size = walk.tensor(node, 0), option(node, "normalized_shape")
    for position in (2, 3):
        dims = walk.given(node, position)
        for own, theirs in zip(dims or [], x[-len(size) :], strict=bool(dims)):
            walk.ids.tie(own, theirs, "layer-norm over a fixed input")
    walk.normed += x[-len(size) :]
    if len(size) > 1:
        walk.freeze(x[-len(size) :], "layer-norm over several dimensions")
    return list(x)


def group_norm(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, groups = walk.tensor(node, 0), option(node, "num_groups")
    walk.normed.append(x[1])
    _tie_slots(walk, x[1], groups, len(x[1]) // groups)
    for position, key in ((2, "weight"), (3, "bias")):
        dims = walk.given(node, position, key)
        if dims is not None:
            walk.ids.tie(dims[0], x[1], "group-norm over a fixed input")
    return list(x)


def prelu(walk: Propagation, node: fx.Node, name: str) -> Any:
    x, w = walk.tensor(node, 0), walk.tensor(node, 1)
    if len(w[0]) > 1:
        walk.ids.tie(w[0], x[1], "prelu over a fixed input")
    else:
        walk.stretch(w[0], name)
    return list(x)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_convolution
    ),
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    **dict.fromkeys(("batch_norm", "instance_norm"), batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    "linear": linear,
    "addmm": addmm,
    "scaled_dot_product_attention": attention,
    "einsum": einsum,
    "embedding": embedding,
    "group_norm": group_norm,
    "prelu": prelu,
}
