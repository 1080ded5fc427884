"""The made-up NPU's arithmetic against Python's own integers and fractions, and torch's float64."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from slimkit_example.npu_interpreter import Integers, add, conv2d, linear, quantized, relu6, shifted
from torch.nn import functional


def integers(*shape, exponent=0, seed=0, limit=127):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-limit, limit + 1, shape, generator=generator).numpy()
    return Integers(values, np.asarray(exponent))


@pytest.mark.parametrize("by", [-40, -9, -1, 0, 1, 5])
def test_a_shift_rounds_half_to_even(by):
    values = np.array([-513, -257, -256, -3, -2, -1, 0, 1, 2, 3, 255, 256, 768, 1280])
    expected = [round(Fraction(int(v)) * Fraction(2) ** by) for v in values]
    assert shifted(values, np.array(by)).tolist() == expected


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 1), 2), ((1, 2), (2, 2), (2, 1), 4)],
)
def test_a_convolution_sums_products_exactly(stride, padding, dilation, groups):
    x, w = integers(2, 8, 7, 9, exponent=-5), integers(12, 8 // groups, 3, 2, seed=1)
    exponents = np.arange(12) - 6
    w = Integers(w.values, exponents.reshape(12, 1, 1, 1))
    bias = Integers(integers(12, limit=5000, seed=2).values, exponents - 5)
    found = conv2d(x, w, bias, stride, padding, dilation, groups)
    operands = [torch.from_numpy(one.values).double() for one in (x, w, bias)]
    expected = functional.conv2d(*operands, stride, padding, dilation, groups)
    assert np.array_equal(found.values, expected.numpy())
    assert found.exponent.flatten().tolist() == (exponents - 5).tolist()


def test_a_matrix_sums_products_exactly():
    x, w = integers(3, 5, exponent=-4), integers(7, 5, seed=1)
    w = Integers(w.values, np.full((7, 1), -3))
    found = linear(x, w)
    assert found.values.tolist() == [
        [sum(int(a) * int(b) for a, b in zip(row, column, strict=True)) for column in w.values]
        for row in x.values
    ]
    assert (found.exponent == -7).all()


def test_a_sum_is_exact_at_the_smaller_exponent():
    a, b = integers(4, 4, exponent=-7), integers(4, 4, exponent=-3, seed=1)
    found = add(a, b)
    assert found.exponent == -7
    assert found.values.tolist() == (a.values + 16 * b.values).tolist()
    assert torch.equal(found.to_host(), a.to_host() + b.to_host())


def test_integers_and_floats_are_rounded_alike():
    sums = Integers(np.arange(-3000, 3000), np.array(-9))
    found, expected = (quantized(x, -4, -127, 127) for x in (sums, sums.to_host()))
    assert np.array_equal(found.values, expected.values)
    assert found.values.min() == -94
    assert quantized(sums, -9, -127, 127).values.max() == 127


def test_six_is_a_bound_where_it_is_an_integer():
    x = Integers(np.array([-5, 90, 200]), np.array(-4))
    assert relu6(x).values.tolist() == [0, 90, 96]
    assert relu6(Integers(x.values, np.array(2))) is None
