"""How channels pass through operations on values: elementwise, pooling, reductions."""

from __future__ import annotations

from typing import Any

from torch import fx

from slimkit.pruning.identities import fixed, stretching
from slimkit.pruning.propagation import (
    Dims,
    Propagation,
    Rule,
    fixed_like,
    option,
    shape_of,
    tensors_of_value,
)

ELEMENTWISE = """
    abs add sub rsub mul div pow exp log sqrt rsqrt neg reciprocal square sigmoid tanh relu relu6
    gelu silu mish elu selu celu hardtanh hardswish hardsigmoid leaky_relu softplus softsign erf sin
    cos clamp clamp_min clamp_max minimum maximum where masked_fill eq ne lt le gt ge logical_and
    logical_or logical_xor logical_not bitwise_not bitwise_and bitwise_or bitwise_xor floor ceil
    round trunc frac sign sgn copy  addcmul lerp threshold expm1 log1p
    log2 log10 exp2 logaddexp logit log_sigmoid hardshrink softshrink tan atan sinh cosh asin acos
    fmod remainder floor_divide true_divide divide multiply subtract isnan nan_to_num clip absolute
"""
COPIES = """
    dropout feature_dropout alpha_dropout clone contiguous detach alias to _to_copy type_as float
    lift_fresh_copy zeros_like ones_like full_like empty_like rand_like fill zero
"""
POOLS = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d lp_pool2d
    max_pool2d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
"""
REDUCTIONS = """
    mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm linalg_norm
    logsumexp prod any all
"""
LINEAR = frozenset({"sum", "norm", "linalg_vector_norm", "linalg_norm", "any", "all"})
"""Reductions that a zero changes nothing in."""
NOT_ZERO = """
    sigmoid hardsigmoid exp exp2 cos cosh softplus log_sigmoid logit acos rsqrt reciprocal log log2
    log10 clamp_min logaddexp eq ne le ge logical_not bitwise_not pow
"""
"""Operations that make something of a zero: silence behind them is not absence."""
SOURCES = """
    arange zeros ones full rand randn empty scalar_tensor eye linspace new_zeros new_ones new_full
    new_empty tensor meshgrid
"""


def elementwise(walk: Propagation, node: fx.Node, name: str) -> Any:
    shape = shape_of(node)
    plain = name.removesuffix("_")
    if plain in NOT_ZERO.split() or (
        plain in ("add", "sub", "rsub") and len(node.all_input_nodes) == 1
    ):
        walk.normed += [dim for read in node.all_input_nodes for dim in walk.dims(read) or []]
    out: Dims = [stretching(size) for size in shape]
    for read in node.all_input_nodes:
        for dims in tensors_of_value(walk.value(read)):
            for d, dim in enumerate(dims, start=len(shape) - len(dims)):
                out[d] = walk.broadcast(out[d], dim, f"{name} with a constant")
    return out


def softmax(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    walk.normed.append(x[(option(node, "dim") or 0) % len(x)])
    return list(x)


def same(walk: Propagation, node: fx.Node, name: str) -> Any:
    return list(walk.tensor(node, 0))


def spatial(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    value = node.meta["val"]
    shapes = [t.shape for t in value] if isinstance(value, list | tuple) else [value.shape]
    unbatched = len(x) == {"1d": 2, "2d": 3, "3d": 4}.get(_suffix(node), -1)
    keep = 1 if unbatched else 2
    for dim in x[keep:]:
        walk.ids.freeze(dim, f"{name} over channels")
    outs = [[*x[:keep], *[fixed(size) for size in shape[keep:]]] for shape in shapes]
    return tuple(outs) if isinstance(value, list | tuple) else outs[0]


def reduction(walk: Propagation, node: fx.Node, name: str) -> Any:
    x = walk.tensor(node, 0)
    value = node.meta["val"]
    several = isinstance(value, list | tuple)
    if getattr(node.target, "_overloadname", "") == "other":  # max and min of two tensors
        return elementwise(walk, node, name)
    given = option(node, "dim")
    dims = range(len(x)) if given is None else [given] if isinstance(given, int) else given
    gone = {d % len(x) for d in dims} or set(range(len(x)))
    if name not in LINEAR:
        walk.normed += [x[d] for d in gone]
    if option(node, "keepdim"):
        out = [fixed(1) if d in gone else dim for d, dim in enumerate(x)]
    else:
        out = [dim for d, dim in enumerate(x) if d not in gone]
    return tuple([list(out) for _ in value]) if several else out


def nothing(walk: Propagation, node: fx.Node, name: str) -> Any:
    return None


def source(walk: Propagation, node: fx.Node, name: str) -> Any:
    return fixed_like(node.meta.get("val"))


def _suffix(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__[-2:] if packet is not None else ""


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(COPIES.split(), same),
    **dict.fromkeys(POOLS.split(), spatial),
    **dict.fromkeys(REDUCTIONS.split(), reduction),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), softmax),
    **dict.fromkeys(SOURCES.split(), source),
    "_assert_tensor_metadata": nothing,
}
