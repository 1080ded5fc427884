"""Chooses single weights, blocks of them or two of each four: which stay, by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimkit.errors import PruningError

Fine = Literal["element", "block", "2:4"]
"""What becomes zero as a whole, where that is not a channel."""

N, M = 2, 4  # of each M consecutive weights along the input dimension, N stay
MOST_REMOVED = 0.95


@dataclass(frozen=True)
class _Units:
    """What stays or goes as a whole, in one tensor.

    Args:
        scores: shape (units,).
        counts: how many weights each has, int64.
        allowed: whether it may go.
        matrix: shape (out, in, kernel) of the tensor with its dimensions in this order.
    """

    scores: Tensor
    counts: Tensor
    allowed: Tensor
    matrix: tuple[int, int, int]


def matrix(score: Tensor, axis: int) -> Tensor:
    """A weight as (out, in, positions of the kernel); `axis` is its input dimension, 0 or 1."""
    outs_first = score.transpose(0, 1) if axis == 0 else score
    return outs_first.reshape(outs_first.shape[0], outs_first.shape[1], -1)


def best_of_four(score: Tensor) -> Tensor:
    """Which two of each four consecutive inputs score best, for scores (out, in, kernel).

    The first wins among equals. The pattern of Mishra et al. 2021, Accelerating Sparse Deep Neural
    Networks, https://arxiv.org/abs/2104.08378.

    >>> best_of_four(torch.tensor([[[1.0], [4.0], [2.0], [3.0]]])).flatten().tolist()
    [False, True, False, True]
    """
    out, fan_in, kernel = score.shape
    fours = score.reshape(out, fan_in // M, M, kernel)
    order = fours.argsort(dim=2, descending=True, stable=True)
    stay = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, order[:, :, :N], True)
    return stay.reshape(out, fan_in, kernel)


def choose(
    scores: Mapping[str, Tensor],
    axes: Mapping[str, int],
    granularity: Fine,
    ratio: float,
    *,
    ranking: str = "global",
    max_ratio: float | Sequence[float] | None = None,
    block_size: tuple[int, int] = (1, 4),
) -> dict[str, Tensor]:
    """Which weights stay: bool, of the scores' shapes.

    Args:
        scores: parameter name to the importance of each weight; below 0 for those that are zero.
        axes: parameter name to its input dimension.
        granularity: ``element``; ``block``, blocks of `block_size` (out, in) at one position of the
            kernel, ranked by their mean score, smaller at the edges of a tensor that is no
            multiple of it; ``2:4``, of each four consecutive inputs the two that score least.
        ratio: the fraction of all weights that goes, in [0, 1); at most 0.5 with 2:4. Never more
            goes, and less by less than one block.
        ranking: ``global`` ranks the scores of all tensors together as they are; with ``local``
            each tensor loses the same fraction, as with 2:4 always.
        max_ratio: the largest fraction that a tensor may lose, or the first tensor's and the
            last's with a straight line between; None: 0.95, or the ratio where that is more.
        block_size: rows and columns of a block.

    Raises:
        PruningError: `max_ratio` does not allow the ratio.
    """
    units = {
        name: _units(matrix(score, axes[name]), granularity, block_size)
        for name, score in scores.items()
    }
    caps = _caps(list(units), ratio, max_ratio)
    if granularity == "2:4" or ranking == "local":
        _check_reachable({name: caps[name] for name in units}, ratio, max_ratio)
        gone = {name: _lowest(unit, ratio) for name, unit in units.items()}
    else:
        within = {name: _lowest(unit, caps[name]) for name, unit in units.items()}
        pooled = _Units(
            torch.cat([u.scores for u in units.values()]),
            torch.cat([u.counts for u in units.values()]),
            torch.cat([*within.values()]),
            (0, 0, 0),
        )
        whole = int(pooled.counts.sum())
        mean = sum(caps[n] * int(u.counts.sum()) for n, u in units.items()) / max(1, whole)
        _check_reachable({"all layers together": mean}, ratio, max_ratio)
        gone = dict(
            zip(units, _lowest(pooled, ratio).split([len(g) for g in within.values()]), strict=True)
        )
    return {
        name: ~_spread(gone[name], units[name].matrix, granularity, block_size, score, axes[name])
        for name, score in scores.items()
    }


def _units(score: Tensor, granularity: Fine, block_size: tuple[int, int]) -> _Units:
    shape = (score.shape[0], score.shape[1], score.shape[2])
    if granularity == "block":
        sums, counts = _blocks(score, block_size), _blocks(torch.ones_like(score), block_size)
        means = (sums / counts).flatten()
        return _Units(means, counts.flatten().long(), torch.ones_like(means) > 0, shape)
    flat = score.flatten()
    allowed = ~best_of_four(score).flatten() if granularity == "2:4" else torch.ones_like(flat) > 0
    return _Units(flat, torch.ones_like(flat, dtype=torch.int64), allowed, shape)


def _blocks(values: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Sums over blocks, shape (blocks down, blocks across, kernel)."""
    rows, columns = block_size
    out, fan_in, kernel = values.shape
    padded = pad(values, (0, 0, 0, -fan_in % columns, 0, -out % rows))
    down, across = padded.shape[0] // rows, padded.shape[1] // columns
    return padded.reshape(down, rows, across, columns, kernel).sum((1, 3))


def _lowest(units: _Units, ratio: float) -> Tensor:
    """The units that score least among those allowed, with at most this fraction of the weights."""
    score = units.scores.masked_fill(~units.allowed, torch.inf)
    order = score.argsort(stable=True)
    most = ratio * int(units.counts.sum()) + 1e-6
    first = units.counts[order].cumsum(0) <= most
    gone = torch.zeros_like(units.allowed)
    gone[order[first]] = True
    return gone & units.allowed


def _spread(
    gone: Tensor,
    shape: tuple[int, int, int],
    granularity: Fine,
    block_size: tuple[int, int],
    like: Tensor,
    axis: int,
) -> Tensor:
    """What is said of units, of each weight."""
    out, fan_in, kernel = shape
    if granularity == "block":
        rows, columns = block_size
        blocks = gone.reshape(-(-out // rows), -(-fan_in // columns), kernel)
        wide = blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        gone = wide[:out, :fan_in]
    outs_first = like.transpose(0, 1) if axis == 0 else like
    back = gone.reshape(outs_first.shape)
    return (back.transpose(0, 1) if axis == 0 else back).contiguous()


def _caps(
    names: Sequence[str], ratio: float, max_ratio: float | Sequence[float] | None
) -> dict[str, float]:
    """The largest fraction that each tensor may lose."""
    if max_ratio is None:
        return dict.fromkeys(names, max(MOST_REMOVED, ratio))
    first, last = max_ratio if isinstance(max_ratio, Sequence) else (max_ratio, max_ratio)
    step = (last - first) / max(1, len(names) - 1)
    return {name: first + step * i for i, name in enumerate(names)}


def _check_reachable(
    caps: Mapping[str, float], ratio: float, max_ratio: float | Sequence[float] | None
) -> None:
    for name, cap in caps.items():
        if cap < ratio - 1e-9:
            raise PruningError(
                f"a ratio of {ratio:g} cannot be reached: max_ratio ({max_ratio}) lets {name} lose "
                f"no more than {cap:.3g}. Lower the target or raise max_ratio"
            )
