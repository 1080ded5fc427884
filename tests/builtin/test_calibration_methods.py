"""Moving average, KL, MSE and ACIQ, each against its definition computed by other means."""

import itertools
import math

import numpy as np
import pytest
import torch
from observing import observed

from slimkit.builtin.quantizers.aciq import ACIQ, laplace_clip, normal_clip
from slimkit.builtin.quantizers.kl import KL, divergence
from slimkit.builtin.quantizers.minmax import MinMax
from slimkit.builtin.quantizers.moving_average import MovingAverage
from slimkit.builtin.quantizers.mse import MSE
from slimkit.interfaces import Grid
from slimkit.registry import discover

BITS = (2, 3, 4, 6, 8)
SYMMETRIC, ASYMMETRIC = Grid(), Grid(signed=False, symmetric=False)
RNG = np.random.default_rng
VALUES = {
    "normal": RNG(0).normal(size=20_000),
    "shifted": RNG(1).normal(size=20_000) + 1,
    "laplace": RNG(2).laplace(size=20_000),
    "relu": np.maximum(RNG(3).normal(size=20_000), 0),
    "silu": (z := RNG(4).normal(size=20_000) * 3) / (1 + np.exp(-z)),
    "uniform": RNG(5).uniform(-1, 1, size=20_000),
    "outlier": np.append(RNG(6).normal(size=20_000), 30.0),
}
VALUES = {name: x.astype(np.float32) for name, x in VALUES.items()}


def covered(quantizer):
    scale, zero_point = quantizer.qparams()
    grid = quantizer.grid
    return ((grid.qmin - zero_point) * scale).item(), ((grid.qmax - zero_point) * scale).item()


def error(x, quantizer):
    """Mean squared error of rounding."""
    return float(np.mean((quantizer(torch.from_numpy(x)).numpy() - x.astype(np.float64)) ** 2))


@pytest.mark.parametrize("name", ["moving-average", "percentile", "kl", "mse", "aciq"])
def test_methods_are_plugins(name):
    assert discover().create("quantizer", name, {}, SYMMETRIC).grid == SYMMETRIC


# moving average


def test_moving_average_is_computed_by_hand():
    grid = Grid(16, signed=False, symmetric=False)
    seen = observed(MovingAverage(grid, momentum=0.75), [-1.0, 4.0], [-3.0, 8.0], [-1.0, 2.0])
    lo, hi = covered(seen)
    assert lo == pytest.approx(0.75 * (0.75 * -1 + 0.25 * -3) + 0.25 * -1, rel=1e-3)
    assert hi == pytest.approx(0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 2, rel=1e-3)


def test_first_batch_sets_the_moving_average():
    assert covered(observed(MovingAverage(SYMMETRIC), [5.0, -1.0]))[1] == pytest.approx(5)


def test_moving_average_without_momentum_is_the_last_batch():
    seen = observed(MovingAverage(SYMMETRIC, momentum=0.0), [9.0], [2.0])
    assert covered(seen)[1] == pytest.approx(2)


def test_moving_average_of_each_channel_is_its_own():
    grid = Grid(per_channel=True, channels=2)
    batches = torch.tensor([[[1.0, -2.0], [30.0, 4.0]], [[3.0, 0.0], [10.0, 0.0]]])
    scale, _ = observed(MovingAverage(grid, momentum=0.5), *batches).qparams()
    assert scale.tolist() == pytest.approx([2 / 127, 20 / 127])


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_momentum_outside_its_limits_is_refused(momentum):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        MovingAverage(SYMMETRIC, momentum=momentum)


# kl


def divergence_by_loops(counts, end, levels):
    """As the talk on TensorRT and ncnn2table say, one bin at a time."""
    p = list(counts[:end])
    p[-1] += sum(counts[end:])
    q = [0.0] * end
    for level in range(levels):
        bins = [i for i in range(end) if level * end // levels <= i < (level + 1) * end // levels]
        filled = [i for i in bins if p[i] > 0]
        for i in filled:  # one value where all are clipped: else the logarithm is infinite
            q[i] = (sum(counts[j] for j in bins) or 1) / len(filled)
    total = sum(counts)
    return sum(a / total * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(6))
def test_divergence_is_that_of_plain_loops(levels, seed):
    counts = RNG(seed).poisson(40 * np.exp(-np.arange(23) / 6)).astype(float)
    counts[RNG(seed).integers(0, 23, 4)] = 0  # gaps
    ends = torch.arange(levels, 24)
    expected = [divergence_by_loops(counts.tolist(), end, levels) for end in ends.tolist()]
    found = divergence(torch.from_numpy(counts), ends, levels)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "outlier"])
def test_kl_takes_the_candidate_of_least_divergence(bits, name):
    grid, x = Grid(bits), np.abs(VALUES[name])
    quantizer = observed(KL(grid), x)
    width = quantizer.width.item()
    counts = np.bincount(np.ceil(x / width).astype(int))[1:].astype(float)
    bound = covered(quantizer)[1]
    ends = range(len(counts), grid.qmax, -1)
    end = round(bound / width) if bound < x.max() * 0.9999 else len(counts)
    losses = {e: divergence_by_loops_fast(counts, e, grid.qmax + 1) for e in [end, *ends[::5]]}
    spread = max(losses.values()) - min(losses.values())
    assert losses[end] <= min(losses.values()) + 0.03 * spread  # candidates are 1/256 apart


def divergence_by_loops_fast(counts, end, levels):
    """The same with numpy inside of the loop over integers."""
    p = counts[:end].copy()
    p[-1] += counts[end:].sum()
    q = np.zeros(end)
    edges = np.arange(levels + 1) * end // levels
    for a, b in itertools.pairwise(edges):
        filled = p[a:b] > 0
        q[a:b][filled] = (counts[a:b].sum() or 1) / max(1, filled.sum())
    some = p > 0
    return float((p[some] / p.sum() * np.log(p[some] / q[some])).sum())


@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_kl_clips_a_far_outlier_to_the_fewest_bins(grid):
    x = np.append(VALUES["normal"], np.float32(1000))
    quantizer = observed(KL(grid), x)
    lo, hi = covered(quantizer)
    bins = (hi if grid.symmetric else hi - lo) / quantizer.width.item()
    assert bins == pytest.approx(grid.qmax + 1, rel=0.1)  # one for each integer


def test_kl_covers_values_far_from_zero():
    x = 10 + VALUES["uniform"]
    assert covered(observed(KL(SYMMETRIC), x))[1] > 10.8


def test_kl_clips_a_thin_tail():
    x = np.concatenate([VALUES["normal"], np.full(2, 12.0, np.float32)])
    lo, hi = covered(observed(KL(SYMMETRIC), x))
    assert 3 < hi < 6
    assert -6 < lo < -3


def test_kl_clips_both_ends_of_an_asymmetric_range_by_themselves():
    x = np.concatenate([VALUES["normal"], np.full(2, 20.0, np.float32)])
    lo, hi = covered(observed(KL(Grid(6, signed=False, symmetric=False)), x))
    mirrored = covered(observed(KL(Grid(6, signed=False, symmetric=False)), -x))
    assert hi < 6
    assert -5 < lo < -2
    assert mirrored[0] == pytest.approx(-hi, abs=1)


def test_zeros_do_not_move_the_kl_range():
    x = np.abs(VALUES["laplace"])
    sparse = np.concatenate([x, np.zeros(100_000, np.float32)])
    assert covered(observed(KL(SYMMETRIC), sparse)) == covered(observed(KL(SYMMETRIC), x))


def test_kl_with_more_integers_than_bins_clips_nothing():
    x = VALUES["laplace"]
    grid = Grid(16)
    assert covered(observed(KL(grid), x)) == covered(observed(MinMax(grid), x))


# mse


def least_error(x, grid):
    """Of all ranges whose ends are shares of the smallest and largest value, 1/100 apart."""
    lo, hi = min(x.min(), 0), max(x.max(), 0)
    shares = np.linspace(0.01, 1, 100)
    ends = [(-b, b) for b in max(-lo, hi) * shares]
    if not grid.symmetric:
        ends = (
            list(itertools.product(lo * shares[::4], hi * shares[::2]))
            if lo
            else [(0, b) for b in hi * shares]
        )
    scale, zero_point = grid.qparams(*torch.tensor(ends).T)
    some = torch.from_numpy(x).double()
    errors = []
    for s, z in zip(scale.double(), zero_point, strict=True):
        q = (some / s).round().clamp(grid.qmin - z, grid.qmax - z)
        errors.append(float((q * s - some).square().mean()))
    return min(errors)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", VALUES)
def test_mse_is_as_good_as_the_best_of_all_ranges(bits, grid, name):
    x = VALUES[name][::-1][:4000].copy()
    grid = Grid(bits, grid.signed, grid.symmetric)
    assert error(x, observed(MSE(grid), x)) <= 1.03 * least_error(x, grid)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_of_each_channel_is_as_good_as_the_best_of_all_ranges(bits, symmetric):
    x = np.stack([VALUES[name][-1000:] for name in VALUES])
    grid = Grid(bits, symmetric=symmetric, per_channel=True, channels=len(x))
    rounded = observed(MSE(grid), x)(torch.from_numpy(x)).numpy()
    for row, its in zip(x, rounded, strict=True):
        best = least_error(row, Grid(bits, symmetric=symmetric))
        assert np.mean((row - its) ** 2) <= 1.03 * best


def test_mse_of_short_channels_is_as_good_as_the_best_and_never_worse_than_without_clipping():
    x = torch.from_numpy(RNG(0).normal(size=(300, 9)).astype(np.float32))
    grid = Grid(4, per_channel=True, channels=300)
    ours, plain = ((observed(make(grid), x)(x) - x).square().mean(1) for make in (MSE, MinMax))
    best = sum(least_error(row.numpy(), Grid(4)) for row in x)
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < 1.01 * best < plain.sum()


def test_mse_takes_blocks_of_channels_as_one():
    x = torch.from_numpy(RNG(0).normal(size=(40, 5000)).astype(np.float32))
    together = observed(MSE(Grid(4, per_channel=True, channels=40)), x).qparams()[0]
    alone = [observed(MSE(Grid(4, per_channel=True, channels=1)), row[None]) for row in x]
    assert together.tolist() == [one.qparams()[0].item() for one in alone]


def test_mse_of_histogram_and_of_values_agree():
    x = VALUES["laplace"]
    streamed = observed(MSE(Grid(4)), x).qparams()[0].item()
    exact = observed(MSE(Grid(4, per_channel=True, channels=1)), x[None]).qparams()[0].item()
    assert streamed == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("factor", [100.0, 1e4])
def test_mse_clips_far_outliers_where_it_pays(factor):
    x = RNG(0).normal(size=2_000_000).astype(np.float32)
    x[0] = factor
    bound = covered(observed(MSE(Grid(2)), x))[1]
    cheap = (factor - 1.22) ** 2 < 0.8 * len(x)  # what clipping costs, what it saves at 2 bits
    assert bound == pytest.approx(1.22 if cheap else factor, rel=0.1)


# aciq


@pytest.mark.parametrize(("bits", "clip"), [(2, 2.83), (3, 3.89), (4, 5.03)])
def test_laplace_clip_is_the_papers(bits, clip):
    assert laplace_clip(2 ** (bits - 1)) == pytest.approx(clip, abs=0.01)


@pytest.mark.parametrize(("bits", "clip"), [(2, 1.71), (3, 2.15), (4, 2.55)])
def test_normal_clip_is_the_papers(bits, clip):
    assert normal_clip(2 ** (bits - 1)) == pytest.approx(clip, abs=0.01)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_aciq_clips_where_the_error_of_samples_is_smallest(bits, kind):
    x = getattr(RNG(0), kind)(size=400_000).astype(np.float32)
    for grid in (Grid(bits), Grid(bits, signed=False, symmetric=False)):
        assert error(x, observed(ACIQ(grid), x)) <= 1.03 * error(x, observed(MSE(grid), x))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_aciq_of_one_sided_values_spends_no_integer_on_the_other_side(bits, kind, sign):
    x = sign * np.maximum(getattr(RNG(0), kind)(size=400_000), 0).astype(np.float32)
    grid = Grid(bits, signed=False, symmetric=False)
    quantizer = observed(ACIQ(grid), x)
    assert min(map(abs, covered(quantizer))) == 0
    assert error(x, quantizer) <= 1.1 * error(x, observed(MSE(grid), x))


def test_aciq_takes_the_likelier_distribution():
    for name, clip, unit in (("normal", normal_clip, 1.0), ("laplace", laplace_clip, 1.0)):
        bound = covered(observed(ACIQ(Grid(4)), VALUES[name]))[1]
        assert bound == pytest.approx(unit * clip(7), rel=0.03)


def test_aciq_is_centred_at_the_mean_on_an_asymmetric_grid():
    lo, hi = covered(observed(ACIQ(Grid(6, signed=False, symmetric=False)), VALUES["shifted"]))
    assert (lo + hi) / 2 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_aciq_copes_with_skewed_values(bits):
    grid, x = Grid(bits, signed=False, symmetric=False), VALUES["silu"]
    assert error(x, observed(ACIQ(grid), x)) <= 1.25 * error(x, observed(MSE(grid), x))


def test_zeros_do_not_move_the_aciq_range():
    x = VALUES["laplace"]
    sparse = np.concatenate([x, np.zeros(100_000, np.float32)])
    assert covered(observed(ACIQ(Grid(4)), sparse)) == covered(observed(ACIQ(Grid(4)), x))


def test_zeros_do_not_move_the_aciq_range_of_a_channel():
    x = np.stack([VALUES["laplace"], VALUES["normal"][:20_000]])
    sparse = np.concatenate([x, np.zeros_like(x)], axis=1)
    grid = Grid(4, per_channel=True, channels=2)
    dense_scale, _ = observed(ACIQ(grid), x).qparams()
    assert torch.allclose(observed(ACIQ(grid), sparse).qparams()[0], dense_scale)


def test_aciq_ignores_the_negative_values_that_an_unsigned_symmetric_grid_makes_zero():
    x = VALUES["normal"].copy()
    x[x < 0] *= 3
    grid = Grid(4, signed=False)
    each = Grid(4, signed=False, per_channel=True, channels=1)
    expected = covered(observed(ACIQ(grid), np.maximum(x, 0)))[1]
    assert covered(observed(ACIQ(grid), x))[1] == pytest.approx(expected, rel=1e-3)
    assert covered(observed(ACIQ(each), x[None]))[1] == pytest.approx(expected, rel=1e-2)


def test_aciq_of_histogram_and_of_values_agree():
    x = VALUES["laplace"]
    for grid in (Grid(4), Grid(4, signed=False, symmetric=False)):
        each = Grid(4, grid.signed, grid.symmetric, per_channel=True, channels=1)
        streamed, exact = observed(ACIQ(grid), x).qparams(), observed(ACIQ(each), x[None]).qparams()
        assert streamed[0].item() == pytest.approx(exact[0].item(), rel=1e-3)
