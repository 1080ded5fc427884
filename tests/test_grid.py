"""The grid's arithmetic, bit for bit against the same formulas written in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slimkit.grid import Grid

GRIDS = [
    Grid(bits, signed, symmetric)
    for bits in (2, 4, 8, 16)
    for signed in (True, False)
    for symmetric in (True, False)
]
numbers = st.floats(-1000, 1000, width=32, allow_subnormal=False)
vectors = arrays(np.float32, st.integers(1, 40), elements=numbers)


@pytest.mark.parametrize(
    ("grid", "limits"),
    [
        (Grid(8, signed=True, symmetric=True), (-127, 127)),
        (Grid(8, signed=True, symmetric=False), (-128, 127)),
        (Grid(8, signed=False, symmetric=True), (0, 255)),
        (Grid(8, signed=False, symmetric=False), (0, 255)),
        (Grid(2, signed=True, symmetric=True), (-1, 1)),
        (Grid(4, signed=True, symmetric=False), (-8, 7)),
        (Grid(16, signed=False, symmetric=False), (0, 65535)),
    ],
)
def test_grid_ends_at_the_integers_of_its_kind(grid, limits):
    assert (grid.qmin, grid.qmax) == limits


def test_a_full_grid_has_the_lowest_integer_and_the_scales_of_the_narrow_one():
    full, ends = Grid(full=True), (torch.tensor([-254.0]), torch.tensor([127.0]))
    assert (full.qmin, full.qmax) == (-128, 127)
    assert full.qparams(*ends) == Grid().qparams(*ends) == (torch.tensor([2.0]), torch.tensor([0]))
    assert full.fake_quantize(torch.tensor([-300.0]), *full.qparams(*ends)).item() == -256.0


@pytest.mark.parametrize("exponent", range(-126, 128))
def test_a_step_that_is_a_power_of_two_stays_and_the_next_number_goes_to_the_next_power(exponent):
    power = np.float32(np.ldexp(1.0, exponent))
    above = np.nextafter(power, np.float32(np.inf))
    found = Grid(power_of_two=True).steps(torch.tensor([power, above])).numpy()
    assert found[0] == power
    assert found[1] == np.ldexp(np.float32(1), min(exponent + 1, 127))


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=25, deadline=None)
@given(vectors)
def test_scales_that_are_powers_of_two_cover_the_range_and_no_smaller_one_does(grid, x):
    lo, hi = torch.tensor([x.min()]), torch.tensor([x.max()])
    plain, _ = grid.qparams(lo, hi)
    scale, zero_point = replace(grid, power_of_two=True).qparams(lo, hi)
    assert np.frexp(scale.item())[0] == 0.5
    assert plain.item() <= scale.item() < 2 * plain.item()
    assert grid.qmin <= zero_point.item() <= grid.qmax


def test_symmetric_scale_is_the_larger_end_over_the_largest_integer():
    scale, zero_point = Grid().qparams(torch.tensor([-254.0]), torch.tensor([127.0]))
    assert (scale.item(), zero_point.item()) == (2.0, 0)


def test_asymmetric_zero_point_is_the_integer_of_zero():
    grid = Grid(signed=False, symmetric=False)
    scale, zero_point = grid.qparams(torch.tensor([-50.0]), torch.tensor([205.0]))
    assert (scale.item(), zero_point.item()) == (1.0, 50)


def test_signed_asymmetric_zero_point_counts_from_the_smallest_integer():
    grid = Grid(signed=True, symmetric=False)
    scale, zero_point = grid.qparams(torch.tensor([-50.0]), torch.tensor([205.0]))
    assert (scale.item(), zero_point.item()) == (1.0, -78)


@pytest.mark.parametrize(("lo", "hi", "scale"), [(3.0, 255.0, 1.0), (-255.0, -3.0, 1.0)])
def test_range_on_one_side_is_widened_to_zero(lo, hi, scale):
    grid = Grid(signed=False, symmetric=False)
    assert grid.qparams(torch.tensor([lo]), torch.tensor([hi]))[0].item() == scale


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("width", [0.0, 1e-42])
def test_range_without_width_gives_scale_one(grid, width):
    scale, _ = grid.qparams(torch.tensor([0.0]), torch.tensor([width]))
    assert scale.item() == 1.0


def test_qparams_have_the_promised_types():
    scale, zero_point = Grid().qparams(torch.zeros(3).double(), torch.ones(3).double())
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("grid", GRIDS)
@given(ends=st.tuples(numbers, numbers))
@settings(max_examples=30, deadline=None)
def test_zero_survives_rounding_exactly(grid, ends):
    lo, hi = torch.tensor([min(ends)]), torch.tensor([max(ends)])
    assert grid.fake_quantize(torch.zeros(1), *grid.qparams(lo, hi)).item() == 0.0


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.signed or not g.symmetric])
@given(x=vectors)
@settings(max_examples=30, deadline=None)
def test_no_value_of_the_covered_range_moves_by_more_than_half_a_step(grid, x):
    x = torch.from_numpy(x)
    scale, zero_point = grid.qparams(x.amin()[None], x.amax()[None])
    error = (grid.fake_quantize(x, scale, zero_point) - x).abs().max()
    clipped = 0.0 if grid.symmetric else 0.5  # rounding the zero point shifts the range
    assert error <= scale * (0.5 + clipped) + 1e-6 * (1 + x.abs().max())  # float32 itself rounds


def integers(grid, x, scale, zero_point):
    """The reference: float32 products rounded half to even, then integers."""
    q = np.rint(x * (np.float32(1) / scale)).astype(np.int64) + zero_point
    return np.clip(q, grid.qmin, grid.qmax)


@pytest.mark.parametrize("grid", GRIDS)
@given(x=vectors, scale=st.floats(2**-10, 4, width=32), shift=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_quantize_gives_the_integers_of_numpy(grid, x, scale, shift):
    scale = np.float32(scale)
    zero_point = 0 if grid.symmetric else round(grid.qmin + shift * (grid.qmax - grid.qmin))
    given_zero = torch.tensor([zero_point], dtype=torch.int32)
    ours = grid.quantize(torch.from_numpy(x), torch.tensor([scale]), given_zero)
    assert np.array_equal(ours.numpy(), integers(grid, x, scale, zero_point))


def test_ties_go_to_the_even_integer():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    q = Grid().quantize(x, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    assert q.tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("learned", [False, True], ids=["fixed scale", "learned scale"])
@pytest.mark.parametrize("per_channel", [False, True])
@given(x=arrays(np.float32, (3, 5), elements=numbers), scale=st.floats(2**-10, 4, width=32))
@settings(max_examples=50, deadline=None)
def test_fake_quantize_is_bit_for_bit_dequantize_of_quantize(learned, per_channel, x, scale):
    x, grid = torch.from_numpy(x), Grid(signed=True, symmetric=False, per_channel=per_channel)
    grid = grid.sized(x)
    scales = torch.full((grid.channels,), scale) * torch.arange(1, grid.channels + 1)
    zeros = torch.arange(grid.channels, dtype=torch.int32) - 7
    faked = grid.fake_quantize(x, scales.clone().requires_grad_(learned), zeros)
    assert torch.equal(faked, grid.dequantize(grid.quantize(x, scales, zeros), scales, zeros))


@pytest.mark.parametrize("learned", [False, True], ids=["fixed scale", "learned scale"])
def test_values_halfway_between_integers_round_as_quantize_does(learned):
    zeros, grid = torch.zeros(1, dtype=torch.int32), Grid()
    halfway = torch.arange(-127, 127) + 0.5
    for scale in torch.linspace(0.001, 0.05, 50).split(1):
        faked = grid.fake_quantize(halfway * scale, scale.clone().requires_grad_(learned), zeros)
        q = grid.quantize(halfway * scale, scale, zeros)
        assert torch.equal(faked, grid.dequantize(q, scale, zeros))


def test_dequantize_multiplies_the_distance_from_the_zero_point():
    q = Grid().dequantize(
        torch.tensor([-3.0, 5.0]), torch.tensor([0.5]), torch.tensor([5], dtype=torch.int32)
    )
    assert q.tolist() == [-4.0, 0.0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_slice_along_the_axis_has_its_own_scale(axis):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    grid = Grid(per_channel=True).sized(x, axis)
    rows = grid.rows(x)
    scale, zero_point = grid.qparams(rows.amin(1), rows.amax(1))
    faked = grid.fake_quantize(x, scale, zero_point)
    one = Grid()
    for i in range(x.shape[axis]):
        part = x.select(axis, i)
        alone = one.qparams(part.amin()[None], part.amax()[None])
        assert torch.equal(faked.select(axis, i), one.fake_quantize(part, *alone))


def test_per_tensor_grid_is_not_sized():
    assert Grid().sized(torch.zeros(5, 2)) == Grid()


@pytest.mark.parametrize("learned", [False, True], ids=["fixed scale", "learned scale"])
def test_gradient_passes_inside_the_range_and_stops_where_it_is_clipped(learned):
    x = torch.tensor([-200.0, -127.0, 0.3, 127.0, 200.0], requires_grad=True)
    scale = torch.ones(1, requires_grad=learned)
    Grid().fake_quantize(x, scale, torch.zeros(1, dtype=torch.int32)).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_learned_scale_gets_the_gradient_of_the_rounding_error_and_of_the_clipping():
    # LSQ (Esser et al. 2020), equation 3: round(x/s) - x/s inside, the last integer outside
    scale = torch.tensor([2.0], requires_grad=True)
    zero_point = torch.zeros(1, dtype=torch.int32)
    gradients = []
    for x in (3.5, 1000.0, -1000.0):
        out = Grid().fake_quantize(torch.tensor([x]), scale, zero_point)
        gradients += torch.autograd.grad(out, scale)[0].tolist()
    assert gradients == [2 - 1.75, 127.0, -127.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fake_quantize_keeps_the_precision_of_its_input(dtype):
    x = torch.linspace(-1, 1, 9, dtype=dtype)
    assert Grid().fake_quantize(x, *Grid().qparams(x.amin()[None], x.amax()[None])).dtype == dtype
