import numpy as np
import pytest
import torch
from slimkit_octav.magnitudes import BINS, Magnitudes
from slimkit_octav.quantizer import OCTAV

from slimkit.interfaces import Grid


def laplace(n=20_000, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).laplace(size=n)).float()


def observed(grid, *batches):
    quantizer = OCTAV(grid)
    for batch in batches:
        quantizer.observe(batch)
    return quantizer


def error_of(grid, x, lo, hi):
    scale, zero_point = grid.qparams(torch.tensor([lo]), torch.tensor([hi]))
    return (grid.fake_quantize(x, scale, zero_point) - x).square().mean().item()


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_clip_of_a_laplace_distribution_is_the_analytic_one(bits):
    # The expected error 2 exp(-s) + s^2 / (12 n^2) of rounding all values is least where
    # s exp(s) = 12 n^2; that only the values inside are rounded moves the root a little.
    n = 2 ** (bits - 1) - 1
    low, high = 0.0, 50.0
    for _ in range(100):
        s = (low + high) / 2
        slope = s / (12 * n**2) * (1 - np.exp(-s)) - np.exp(-s)
        low, high = (s, high) if slope < 0 else (low, s)
    found = observed(Grid(bits=bits), laplace(400_000)).qparams()[0].item() * n
    assert found == pytest.approx(s, rel=0.02)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_other_range_has_a_much_smaller_error(bits, symmetric):
    x = laplace() + 0.3
    grid = Grid(bits=bits, signed=symmetric, symmetric=symmetric)
    quantizer = observed(grid, x)
    mine = (quantizer(x) - x).square().mean().item()
    tried = [
        error_of(grid, x, -low if not symmetric else -high, high)
        for high in np.linspace(1, x.max().item(), 40)
        for low in ([0.0] if symmetric else np.linspace(1, -x.min().item(), 40))
    ]
    assert mine < 1.05 * min(tried)


def test_it_clips_less_the_more_bits_there_are():
    ends = [
        observed(Grid(bits=b), laplace()).qparams()[0].item() * Grid(bits=b).qmax
        for b in (2, 4, 6, 8)
    ]
    assert ends == sorted(ends)


def test_each_channel_of_a_weight_is_clipped_for_itself():
    rows = torch.stack([laplace(5000, seed) * 10.0**seed for seed in range(3)])
    together = observed(Grid(bits=4, per_channel=True, channels=3), rows).qparams()[0]
    alone = [observed(Grid(bits=4), row).qparams()[0].item() for row in rows]
    assert together.tolist() == pytest.approx(alone, rel=1e-3)


def test_bins_hold_every_value_once_however_they_widen():
    seen = Magnitudes()
    for k in range(-6, 6):
        seen.count(laplace(100) * 10.0**k)
    assert seen.counts.sum().item() == 1200
    total = sum((laplace(100).abs().double() * 10.0**k).sum().item() for k in range(-6, 6))
    assert seen.sums.sum().item() == pytest.approx(total)


def test_zeros_are_not_counted():
    seen = Magnitudes()
    seen.count(torch.zeros(50))
    assert seen.counts.sum().item() == 0


def test_the_largest_value_lies_in_the_upper_half_of_the_bins():
    seen = Magnitudes()
    seen.count(torch.tensor([1.0, 3.0]))
    assert seen.counts[1].nonzero().max().item() >= BINS // 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        observed(Grid(), torch.tensor([1.0, bad]))
