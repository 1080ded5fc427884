"""The ranges that quantizers choose, against numpy on the same values."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slimkit.builtin.quantizers.minmax import MinMax
from slimkit.builtin.quantizers.percentile import Percentile
from slimkit.interfaces import Grid

SYMMETRIC, ASYMMETRIC = Grid(), Grid(signed=False, symmetric=False)
QUANTIZERS = [MinMax, Percentile]
finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def observed(quantizer, *batches):
    for batch in batches:
        quantizer.observe(torch.as_tensor(batch))
    return quantizer


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


@pytest.mark.parametrize("make", QUANTIZERS)
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


@given(
    x=arrays(np.float32, st.integers(1, 200), elements=finite),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=80, deadline=None)
def test_percentile_does_not_depend_on_batches_or_their_order(x, cuts, order):
    ends = [0, *sorted(min(c, len(x)) for c in cuts), len(x)]
    batches = [x[a:b] for a, b in itertools.pairwise(ends)]
    order.shuffle(batches)
    whole = observed(Percentile(ASYMMETRIC, percentile=90), x)
    parts = observed(Percentile(ASYMMETRIC, percentile=90), *batches)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.qparams() == parts.qparams()


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
