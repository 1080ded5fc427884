"""The ranges that quantizers choose, against numpy on the same values."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from observing import observed

from slimkit.builtin.quantizers.aciq import ACIQ
from slimkit.builtin.quantizers.kl import KL
from slimkit.builtin.quantizers.minmax import MinMax
from slimkit.builtin.quantizers.moving_average import MovingAverage
from slimkit.builtin.quantizers.mse import MSE
from slimkit.builtin.quantizers.percentile import Percentile
from slimkit.interfaces import Grid

SYMMETRIC, ASYMMETRIC = Grid(), Grid(signed=False, symmetric=False)
HISTOGRAMS = [Percentile, KL, MSE, ACIQ]
QUANTIZERS = [MinMax, MovingAverage, *HISTOGRAMS]
GRIDS = {
    f"{bits} bits{' signed' * signed}{' symmetric' * symmetric}": Grid(bits, signed, symmetric)
    for bits, signed, symmetric in itertools.product((2, 4, 8, 16), (False, True), (False, True))
}
finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def covered(quantizer):
    """The smallest and largest value that the quantizer does not clip, per channel."""
    scale, zero_point = quantizer.qparams()
    grid = quantizer.grid
    return ((grid.qmin - zero_point) * scale).numpy(), ((grid.qmax - zero_point) * scale).numpy()


def noise(n, seed=0):
    """Lopsided values with long tails on both sides."""
    rng = np.random.default_rng(seed)
    return (rng.laplace(size=n) + 0.2 * rng.exponential(size=n)).astype(np.float32)


@pytest.mark.parametrize("make", QUANTIZERS)
@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
class TestEveryQuantizer:
    def test_without_data_has_scale_one(self, make, grid):
        assert make(grid).qparams()[0].tolist() == [1.0]

    def test_of_zeros_only_has_scale_one(self, make, grid):
        assert observed(make(grid), torch.zeros(4, 4)).qparams()[0].tolist() == [1.0]

    def test_takes_an_empty_tensor_without_effect(self, make, grid):
        seen = observed(make(grid), noise(100))
        before = seen.qparams()
        assert observed(seen, torch.zeros(0, 3)).qparams() == before

    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4, 5, 6)])
    def test_takes_any_shape(self, make, grid, shape):
        assert covered(observed(make(grid), torch.full(shape, 2.0)))[1] == pytest.approx(2.0)

    def test_keeps_what_it_saw_in_its_state(self, make, grid):
        seen, loaded = observed(make(grid), noise(1000)), make(grid)
        loaded.load_state_dict(seen.state_dict())
        assert loaded.qparams() == seen.qparams()

    def test_goes_on_from_a_loaded_state(self, make, grid):
        seen, loaded = observed(make(grid), noise(500, 0)), make(grid)
        loaded.load_state_dict(seen.state_dict())
        assert observed(loaded, noise(500, 1)).qparams() == observed(seen, noise(500, 1)).qparams()

    def test_forward_rounds_to_its_own_range(self, make, grid):
        seen, x = observed(make(grid), noise(1000)), torch.from_numpy(noise(50, 1))
        scale, zero_point = seen.qparams()
        q = grid.quantize(x, scale, zero_point)
        assert torch.equal(seen(x), grid.dequantize(q, scale, zero_point))

    def test_takes_half_precision(self, make, grid):
        seen = observed(make(grid), torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
        assert seen.qparams()[0].dtype == torch.float32

    def test_keeps_no_graph_of_what_it_saw(self, make, grid):
        seen = observed(make(grid), torch.ones(3, requires_grad=True))
        assert not any(buffer.requires_grad for buffer in seen.buffers())

    def test_each_end_is_that_of_its_own_side(self, make, grid):
        lo, hi = covered(observed(make(grid), np.linspace(-8, 1, 4000, dtype=np.float32)))
        assert lo.item() == pytest.approx(-8, rel=0.02)
        assert hi.item() == pytest.approx(8 if grid.symmetric else 1, rel=0.06)

    def test_keeps_zero_exactly(self, make, grid):
        seen = observed(make(grid), noise(1000) + 5)
        assert seen(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]

    def test_half_precision_gives_the_range_of_the_same_values(self, make, grid):
        x = torch.from_numpy(noise(1000)).half()
        halves, floats = (
            observed(make(grid), x).qparams(),
            observed(make(grid), x.float()).qparams(),
        )
        assert halves == floats

    def test_memory_layout_does_not_matter(self, make, grid):
        x = torch.from_numpy(noise(2 * 3 * 4 * 5)).view(2, 3, 4, 5)
        expected = observed(make(grid), x).qparams()
        assert observed(make(grid), x.to(memory_format=torch.channels_last)).qparams() == expected
        assert observed(make(grid), x.expand(2, *x.shape)[:, :, 1:]).qparams() == (
            observed(make(grid), x[:, 1:]).qparams()
        )


@pytest.mark.parametrize("make", QUANTIZERS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
class TestEveryQuantizerOnEveryGrid:
    @pytest.mark.parametrize("value", [3.7, 1e-20, 1e20])
    def test_a_constant_is_covered_exactly(self, make, grid, value):
        _, hi = covered(observed(make(grid), torch.full((50,), value)))
        assert hi.item() == pytest.approx(value, rel=1e-5)

    def test_covers_no_more_than_was_seen(self, make, grid):
        x = noise(2000)
        scale, _ = observed(make(grid), x).qparams()
        assert scale.item() <= observed(MinMax(grid), x).qparams()[0].item() * 1.0001

    def test_negative_values_alone_give_a_positive_scale(self, make, grid):
        scale, zero_point = observed(make(grid), -np.abs(noise(500))).qparams()
        assert scale.item() > 0
        assert grid.qmin <= zero_point.item() <= grid.qmax

    def test_per_channel_gives_one_range_a_channel(self, make, grid):
        x = torch.from_numpy(noise(600)).view(3, 200)
        each = replace(grid, per_channel=True).sized(x)
        scale, zero_point = observed(make(each), x).qparams()
        assert scale.shape == zero_point.shape == (3,)
        assert (scale > 0).all()


@pytest.mark.parametrize("make", [MinMax, MovingAverage, Percentile, KL])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_channel_has_the_range_of_its_own_values(make, axis):
    x = torch.from_numpy(noise(3 * 1000).reshape(3, 1000)) * torch.tensor([[1.0], [10.0], [0.1]])
    grid = Grid(per_channel=True)
    together = observed(make(grid.sized(x, 0)), x).qparams()[0]
    if axis == 1:
        x = x.T.contiguous()
        together = observed(make(grid.sized(x, 1)), x).qparams()[0]
        x = x.T
    assert together.tolist() == [observed(make(Grid()), row).qparams()[0].item() for row in x]


def test_minmax_covers_everything_seen_so_far():
    lo, hi = covered(observed(MinMax(ASYMMETRIC), [-1.0, 3.0], [-2.0, 0.5], [0.0, 2.0]))
    assert (lo.item(), hi.item()) == (pytest.approx(-2, abs=0.01), pytest.approx(3, abs=0.01))


def test_minmax_range_is_not_narrowed_by_smaller_batches():
    seen = observed(MinMax(SYMMETRIC), [127.0])
    assert observed(seen, [1.0]).qparams()[0].item() == 1.0


def bounds(x, percentile, symmetric):
    """The smallest and largest value inside the percentile, by numpy."""
    if symmetric:
        bound = np.percentile(np.abs(x), percentile, method="inverted_cdf")
        return -bound, bound
    tail = (100 - percentile) / 2
    return (
        min(0.0, -np.percentile(-x, 100 - tail, method="inverted_cdf")),
        max(0.0, np.percentile(x, 100 - tail, method="inverted_cdf")),
    )


def bin_width(x):
    """1/1024 of the power of two at or below the largest absolute value."""
    return float(2.0 ** (np.floor(np.log2(np.abs(x).max())) - 10))


@pytest.mark.parametrize("percentile", [60, 90, 99, 99.9, 100])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_symmetric_percentile_is_numpys_within_one_bin(percentile, scale):
    x = noise(10_007) * np.float32(scale)
    lo, hi = covered(observed(Percentile(SYMMETRIC, percentile=percentile), x))
    expected = bounds(x, percentile, symmetric=True)
    assert hi.item() == pytest.approx(expected[1], abs=bin_width(x) * 1.001)
    assert lo.item() == pytest.approx(expected[0], abs=bin_width(x) * 1.001)


@pytest.mark.parametrize("percentile", [60, 90, 99, 99.9, 100])
@pytest.mark.parametrize("offset", [-8.0, 0.0, 8.0])
def test_asymmetric_percentile_is_numpys_within_one_bin(percentile, offset):
    x = noise(10_007) + np.float32(offset)
    grid = Grid(16, signed=False, symmetric=False)  # its own step is small against a bin
    lo, hi = covered(observed(Percentile(grid, percentile=percentile), x))
    expected = bounds(x, percentile, symmetric=False)
    assert lo.item() == pytest.approx(expected[0], abs=bin_width(x) * 1.1)
    assert hi.item() == pytest.approx(expected[1], abs=bin_width(x) * 1.1)


def test_percentile_never_covers_more_than_was_seen():
    x = noise(1009)
    grid = Grid(16, signed=False, symmetric=False)
    lo, hi = covered(observed(Percentile(grid, percentile=100), x))
    assert (lo.item(), hi.item()) == (
        pytest.approx(x.min(), rel=1e-3),
        pytest.approx(x.max(), rel=1e-3),
    )


def test_outliers_beyond_the_percentile_are_clipped():
    x = np.concatenate([np.linspace(-1, 1, 9999, dtype=np.float32), np.float32([1000])])
    assert covered(observed(Percentile(SYMMETRIC, percentile=99.9), x))[1] < 2.5


@pytest.mark.parametrize("make", HISTOGRAMS)
@given(
    x=arrays(np.float32, st.integers(1, 200), elements=finite),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_the_range_does_not_depend_on_batches_or_their_order(make, x, cuts, order):
    ends = [0, *sorted(min(c, len(x)) for c in cuts), len(x)]
    batches = [x[a:b] for a, b in itertools.pairwise(ends)]
    order.shuffle(batches)
    whole = observed(make(ASYMMETRIC), x)
    parts = observed(make(ASYMMETRIC), *batches)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.qparams() == parts.qparams()


@pytest.mark.parametrize("make", HISTOGRAMS)
class TestEveryHistogram:
    def test_size_is_the_same_for_any_number_of_images(self, make):
        seen = observed(make(ASYMMETRIC), noise(100))
        before = sum(buffer.numel() for buffer in seen.buffers())
        observed(seen, *(noise(1000, seed) * 2.0**seed for seed in range(20)))
        assert sum(buffer.numel() for buffer in seen.buffers()) == before

    def test_keeps_no_histogram_of_each_channel(self, make):
        quantizer = make(Grid(per_channel=True, channels=2048))
        assert sum(buffer.numel() for buffer in quantizer.buffers()) <= 2 * 2048

    def test_several_tensors_of_a_channel_get_the_range_that_holds_all(self, make):
        grid = Grid(4, per_channel=True, channels=2)
        small, large = (torch.from_numpy(noise(200, i)).view(2, 100) * 10**i for i in range(2))
        both = observed(make(grid), small, large).qparams()[0]
        assert torch.equal(both, observed(make(grid), large).qparams()[0])
        assert torch.equal(both, observed(make(grid), large, small).qparams()[0])

    def test_range_follows_what_is_observed_after_it_was_asked_for(self, make):
        seen = observed(make(SYMMETRIC), noise(100))
        seen.qparams()
        assert observed(seen, 100 * noise(100)).qparams() == (
            observed(make(SYMMETRIC), noise(100), 100 * noise(100)).qparams()
        )

    def test_range_is_that_of_the_loaded_counts(self, make):
        seen, loaded = observed(make(SYMMETRIC), noise(1000)), observed(make(SYMMETRIC), noise(9))
        loaded.qparams()
        loaded.load_state_dict(seen.state_dict())  # saved before its range was asked for
        assert loaded.qparams() == seen.qparams()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_refuses_what_is_not_finite(self, make, bad):
        with pytest.raises(ValueError, match="NaN or infinity"):
            observed(make(SYMMETRIC), [1.0, bad])

    def test_counts_every_value_in_its_bin(self, make):
        x = noise(300_000)  # more than are counted at a time
        x[:1000] = 0
        seen = observed(make(SYMMETRIC), x)
        half = len(seen.counts) // 2
        exact = x.astype(np.float64) / seen.width.item()
        bins = np.where(exact < 0, np.floor(exact), np.ceil(exact)).astype(int) + half
        assert seen.counts.tolist() == np.bincount(bins, minlength=2 * half + 1).tolist()
        assert seen.counts[half] == 1000
        assert np.abs(x).max() / seen.width.item() > half / 2  # at least half of the bins are used

    @pytest.mark.parametrize("largest", [1.0, 2.0, 2.0**-20])
    def test_a_power_of_two_fills_all_bins(self, make, largest):
        seen = observed(make(SYMMETRIC), [-largest, largest / 3, largest])
        assert seen.counts[[0, -1]].tolist() == [1, 1]


def test_every_value_is_counted_once_when_bins_widen():
    seen = observed(Percentile(SYMMETRIC), *(noise(100) * 10.0**k for k in range(-6, 6)))
    assert seen.counts.sum().item() == 1200


@pytest.mark.parametrize("sign", [-1, 1])
def test_widening_merges_neighbours_on_the_same_side_of_zero(sign):
    small, large = sign * noise(500), np.float32([40.0, -40.0])
    merged = observed(Percentile(ASYMMETRIC), small, large)
    assert torch.equal(merged.counts, observed(Percentile(ASYMMETRIC), large, small).counts)


def test_percentile_goes_from_denormal_values_to_large_ones():
    seen = observed(Percentile(SYMMETRIC, percentile=100), [1e-43, -1e-43], [1e4, -1e4])
    assert covered(seen)[1] == pytest.approx(1e4)


@pytest.mark.parametrize("percentile", [50, 0, -1, 100.1, float("nan")])
def test_percentile_outside_its_limits_is_refused(percentile):
    with pytest.raises(ValueError, match="over 50 and at most 100"):
        Percentile(SYMMETRIC, percentile=percentile)
