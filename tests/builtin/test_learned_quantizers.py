"""Quantizers whose range is found by gradient, against the papers' formulas in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from slimkit.builtin.quantizers.lsq import LSQ
from slimkit.builtin.quantizers.pact import PACT
from slimkit.grid import Grid
from slimkit.interfaces import Quantizer
from slimkit.quantization.calibration import quantize

LEARNED = [LSQ, PACT]
GRIDS = {
    "symmetric": Grid(),
    "symmetric, 4 bits": Grid(bits=4),
    "uint8": Grid(signed=False, symmetric=False),
    "uint4": Grid(bits=4, signed=False, symmetric=False),
    "asymmetric int8": Grid(symmetric=False),
    "unsigned symmetric": Grid(signed=False),
    "per channel": Grid(bits=4, per_channel=True, channels=3),
    "per channel, asymmetric": Grid(per_channel=True, channels=3, symmetric=False),
}


def lopsided(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values with long tails, more of them above zero than below."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.laplace(size=shape) + 0.4).astype(np.float32))


def seen(make: type[Quantizer], grid: Grid, *batches: torch.Tensor) -> Quantizer:
    quantizer = make(grid)
    for batch in batches:
        quantizer.observe(batch)
    return quantizer


def integers(quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
    """What the device computes with the quantizer's own numbers."""
    scale, zero_point = quantizer.qparams()
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    grid = quantizer.grid
    return grid.dequantize(grid.quantize(x, scale, zero_point), scale, zero_point)


@pytest.mark.parametrize("make", LEARNED)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
class TestEveryLearnedQuantizer:
    def test_forward_is_integer_arithmetic_with_its_qparams_to_the_last_bit(self, make, grid):
        quantizer = seen(make, grid, lopsided(3, 500))
        for step in range(20):
            x = 3 * lopsided(3, 200, seed=step)
            learning = quantizer(x.clone().requires_grad_())
            with torch.no_grad():
                evaluated = quantizer(x)
            assert torch.equal(learning, integers(quantizer, x))
            assert torch.equal(evaluated, learning)
            learning.square().sum().backward()
            with torch.no_grad():  # on to numbers that no observation gives
                for parameter in quantizer.parameters():
                    parameter.mul_(0.9871)
            quantizer.zero_grad()

    def test_every_parameter_gets_a_gradient_where_values_are_clipped(self, make, grid):
        quantizer = seen(make, grid, lopsided(3, 500))
        (quantizer(20 * lopsided(3, 500)) - 20 * lopsided(3, 500)).square().sum().backward()
        assert len(list(quantizer.parameters())) == 1 + (not grid.symmetric)
        for parameter in quantizer.parameters():
            assert parameter.grad.shape == (grid.channels,)
            assert parameter.grad.abs().min() > 0

    def test_training_widens_a_range_that_clips_too_much(self, make, grid):
        x = lopsided(3, 2000).abs()
        quantizer = seen(make, grid, 0.1 * x)
        before = (quantizer(x) - x).square().mean().item()
        lr = 0.02 if make is LSQ else 0.02 * quantizer.alpha.mean().item()
        optimizer = torch.optim.Adam(quantizer.parameters(), lr)
        for _ in range(500):
            optimizer.zero_grad()
            (quantizer(x) - x).square().mean().backward()
            optimizer.step()
        assert (quantizer(x) - x).square().mean().item() < 0.2 * before

    def test_scale_stays_positive_whatever_the_optimizer_does(self, make, grid):
        quantizer = seen(make, grid, lopsided(3, 500))
        for value in (-3.0, 0.0, 1e-40, 1e30):
            with torch.no_grad():
                for parameter in quantizer.parameters():
                    parameter.fill_(value)
            scale, zero_point = quantizer.qparams()
            assert (scale > 0).all()
            assert torch.isfinite(scale).all()
            assert ((zero_point >= grid.qmin) & (zero_point <= grid.qmax)).all()
            assert torch.isfinite(quantizer(lopsided(3, 5))).all()

    def test_learned_range_is_kept_in_its_state(self, make, grid):
        quantizer, loaded = seen(make, grid, lopsided(3, 500)), make(grid)
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.mul_(0.7)
        loaded.load_state_dict(quantizer.state_dict())
        for mine, theirs in zip(loaded.qparams(), quantizer.qparams(), strict=True):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_comes_back_with_gradients(self, make, grid, dtype):
        quantizer = seen(make, grid, lopsided(3, 500))
        x = (4 * lopsided(3, 50)).to(dtype).requires_grad_()
        out = quantizer(x)
        assert out.dtype == dtype
        assert torch.equal(out, integers(quantizer, x.detach().float()).to(dtype))
        out.float().square().sum().backward()
        assert x.grad.dtype == dtype
        assert all(p.grad.dtype == torch.float32 for p in quantizer.parameters())

    def test_frozen_range_still_passes_gradients_on(self, make, grid):
        quantizer = seen(make, grid, lopsided(3, 500)).requires_grad_(False)
        x = (0.01 * lopsided(3, 50)).abs().requires_grad_()
        quantizer(x).sum().backward()
        assert x.grad.eq(1).all()
        assert all(p.grad is None for p in quantizer.parameters())


def papers_gradient(x: torch.Tensor, upstream: torch.Tensor, step: float, qmax: int) -> float:
    """Esser et al. 2020, equation 3 and section 2.2; clipped is what rounds beyond the grid."""
    v = x.double().numpy() / step
    slope = np.where(np.abs(v) < qmax + 0.5, np.rint(v) - v, qmax * np.sign(v))
    return (upstream.double().numpy() * slope).sum() / np.sqrt(x.numel() * qmax)


@pytest.mark.parametrize("shape", [(1000,), (600, 1000)])  # the second is computed in slices
def test_sgd_moves_the_step_as_in_the_paper(shape: tuple[int, ...]) -> None:
    x = 3 * lopsided(*shape)
    upstream = 1e-4 * lopsided(*shape, seed=5)
    quantizer = seen(LSQ, Grid(bits=4), lopsided(1000))
    step = quantizer.qparams()[0].item()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    quantizer(x).backward(upstream)
    optimizer.step()
    moved = quantizer.qparams()[0].item() - step
    assert moved == pytest.approx(-0.5 * papers_gradient(x, upstream, step, 7), rel=1e-2)


def test_no_step_moves_by_more_than_the_learning_rates_share() -> None:
    quantizer = seen(LSQ, Grid(), 1e-3 * lopsided(1000))
    step = quantizer.qparams()[0].item()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.125)
    quantizer(lopsided(1000)).backward(-1e6 * lopsided(1000).sign())
    optimizer.step()
    assert quantizer.qparams()[0].item() == pytest.approx(1.125 * step)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_adam_moves_small_and_large_steps_by_the_same_share(size: float) -> None:
    x = size * lopsided(1000)
    quantizer = seen(LSQ, Grid(bits=4), x)
    step = quantizer.qparams()[0].item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    quantizer(x).backward(x / x.abs().max())  # smaller values wanted
    optimizer.step()
    assert quantizer.qparams()[0].item() == pytest.approx(0.99 * step, rel=1e-3)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_training_narrows_the_step_of_an_outlier(bits: int) -> None:
    x = lopsided(2000)
    quantizer = seen(LSQ, Grid(bits=bits), 8 * x)
    before = (quantizer(x) - x).square().mean().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert (quantizer(x) - x).square().mean().item() < 0.5 * before


def test_every_channels_step_has_the_gradient_that_it_has_alone() -> None:
    x = torch.stack([lopsided(100, seed=i) * 4**i for i in range(3)])
    together = seen(LSQ, Grid(bits=4, per_channel=True, channels=3), x)
    together(2 * x).backward(0.01 * x)
    for i in range(3):
        alone = seen(LSQ, Grid(bits=4), x[i])
        alone(2 * x[i]).backward(0.01 * x[i])
        assert together.qparams()[0][i].item() == alone.qparams()[0].item()
        assert 0 < abs(alone.ratio.grad.item()) < 1
        assert together.ratio.grad[i].item() == pytest.approx(alone.ratio.grad.item(), rel=1e-4)


def test_gradient_of_the_offset_is_that_of_what_is_clipped() -> None:
    # Bhalgat et al. 2020, equation 6: 0 inside, 1 outside; here per width of the first range
    grid = Grid(bits=4, signed=False, symmetric=False)
    quantizer = seen(LSQ, grid, lopsided(1000))
    x, upstream = 5 * lopsided(1000), 0.01 * lopsided(1000, seed=5)
    quantizer(x).backward(upstream)
    scale, zero = (q.item() for q in quantizer.qparams())
    q = np.rint(x.double().numpy() / scale) + zero
    clipped = (q < 0) | (q > 15)
    expected = upstream.double().numpy()[clipped].sum() / np.sqrt(1000 * 15)
    assert quantizer.shift.grad.item() * 15 * scale == pytest.approx(expected, rel=1e-3)


def test_lsq_begins_at_the_papers_step_or_at_what_covers_all() -> None:
    x = lopsided(10_000)
    mean, largest = x.abs().mean().item(), x.abs().max().item()
    four, eight = (seen(LSQ, Grid(bits=b), x[:3000], x[3000:]).qparams()[0].item() for b in (4, 8))
    assert four == pytest.approx(2 * mean / np.sqrt(7), rel=1e-5)
    assert eight == pytest.approx(largest / 127, rel=1e-6)


def test_lsq_on_an_asymmetric_grid_begins_with_both_ends_observed() -> None:
    quantizer = seen(LSQ, Grid(signed=False, symmetric=False), torch.tensor([-1.0, 0.5, 4.0]))
    assert quantizer.qparams()[0].item() == pytest.approx(5 / 255)
    assert quantizer.qparams()[1].item() == 51


def test_pact_alpha_gets_the_gradients_of_all_that_it_clips() -> None:
    # Choi et al. 2018, equation 3
    quantizer = seen(PACT, Grid(bits=4, signed=False, symmetric=False), torch.tensor([0.0, 3.0]))
    x = torch.tensor([-2.0, 0.5, 2.9, 3.2, 50.0], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert quantizer.alpha.grad.item() == 11000
    assert x.grad.tolist() == [0, 10, 100, 0, 0]
    assert quantizer.beta.item() == 0  # a ReLU in front: nothing below zero was observed


def test_pact_clips_alike_on_both_sides_of_a_symmetric_grid() -> None:
    quantizer = seen(PACT, Grid(bits=4), torch.tensor([-1.0, 3.0]))
    x = torch.tensor([-50.0, -2.9, 2.9, 50.0], requires_grad=True)
    out = quantizer(x)
    out.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert [round(v, 4) for v in out.tolist()] == [-3, -3, 3, 3]
    assert quantizer.alpha.grad.item() == 1000 - 1
    assert x.grad.tolist() == [0, 10, 100, 0]


def test_pact_clips_below_too_where_negative_values_were_observed() -> None:
    quantizer = seen(PACT, Grid(signed=False, symmetric=False), torch.tensor([-1.0, 3.0]))
    x = torch.tensor([-50.0, 0.3, 50.0], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 10.0, 100.0]))
    assert (quantizer.alpha.grad.item(), quantizer.beta.grad.item()) == (100, -1)


# --- in a model -------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


@pytest.mark.parametrize("name", ["lsq", "pact"])
@pytest.mark.parametrize("backend", ["onnxruntime", "ncnn"])
def test_works_after_training_as_any_other(name: str, backend: str) -> None:
    model, x = net(), lopsided(256, 16)
    small = quantize(model, [x], backend, weights=name, activations=name)
    with torch.no_grad():
        error = (small(x) - model(x)).square().mean() / model(x).square().mean()
    assert error < 1e-3


@pytest.mark.parametrize("weights", ["lsq", "pact"])
def test_learned_range_of_a_weight_is_not_fitted_anew(weights: str) -> None:
    small = quantize(net(), [lopsided(64, 16)], weights=weights).train()
    small(lopsided(8, 16)).sum().backward()
    learned = [p for n, p in small.named_parameters() if "weight" in n and n.startswith("fake")]
    assert len(learned) == 2
    assert weights == "pact" or all(p.grad.abs().sum() > 0 for p in learned)
    with torch.no_grad():
        for p in learned:
            p.mul_(0.8)
        small.model[0].weight.mul_(3)
    before = [p.clone() for p in learned]
    small(lopsided(8, 16))
    assert all(torch.equal(p, b) for p, b in zip(learned, before, strict=True))


def test_before_it_rounds_a_learned_range_follows_the_weight() -> None:
    small = quantize(net(), [lopsided(64, 16)], weights="lsq")
    with torch.no_grad():
        small.model[0].weight.mul_(64)
    name, path = small.fake.sites.weights["0:linear:0"]
    small(lopsided(8, 16))
    scale, _ = small.fake[name].qparams()
    fresh = LSQ(small.fake[name].grid)
    fresh.observe(dict(small.model.named_parameters())[path])
    assert torch.equal(scale, fresh.qparams()[0])


def test_learned_ranges_survive_state_dict_and_copy() -> None:
    x = lopsided(8, 16)
    small = quantize(net(), [lopsided(64, 16)], weights="lsq", activations="lsq")
    small(x)
    with torch.no_grad():
        for p in small.fake.parameters():
            p.mul_(0.8)
    other = quantize(net(), [9 * lopsided(64, 16)], weights="lsq", activations="lsq")
    other.load_state_dict(small.state_dict())
    expected = small(x)
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(small)(x), expected)


def test_weights_of_four_bits_have_fifteen_values() -> None:
    small = quantize(net(), [lopsided(64, 16)], weight_bits=4)
    name, path = small.fake.sites.weights["0:linear:0"]
    weight = small.fake.weight(name, dict(small.model.named_parameters())[path])
    assert max(len(row.unique()) for row in weight) <= 15
    assert max(len(row.unique()) for row in weight) > 8


def test_learned_steps_are_powers_of_two_where_the_grid_asks_for_them():
    grid = Grid(power_of_two=True)
    quantizer, x = LSQ(grid), torch.linspace(-3, 3, 61)
    quantizer.observe(x)
    with torch.no_grad():
        quantizer.ratio.fill_(1.3)
    y = quantizer(x)
    y.square().sum().backward()
    scale, zero_point = quantizer.qparams()
    assert (torch.frexp(scale)[0] == 0.5).all()
    assert torch.equal(y.detach(), grid.fake_quantize(x, scale, zero_point))
    assert quantizer.ratio.grad.abs() > 0
