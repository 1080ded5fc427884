"""How near a deployed file is to the simulation."""

from __future__ import annotations

import math

import pytest
import torch
from nets import normal

from slimkit.deploy.agreement import compare
from slimkit.errors import ExportError


def test_equal_outputs_agree_to_the_last_bit() -> None:
    a = normal(5, 3)
    found = compare([a, a * 2], [a, a * 2])
    assert found.top1 == 1
    assert found.sqnr_db == (math.inf, math.inf)
    assert (found.largest_difference, found.close, found.inputs) == (0, 1, 5)


def test_top1_is_the_share_of_inputs_with_the_same_class() -> None:
    a = torch.eye(4)
    b = a.clone()
    b[0] = torch.tensor([0.0, 9.0, 0.0, 0.0])
    assert compare([a], [b]).top1 == 0.75


def test_sqnr_of_a_hundredth_of_the_amplitude_is_40_decibels() -> None:
    a = normal(5, 3)
    assert compare([a], [a * 1.01]).sqnr_db[0] == pytest.approx(40, abs=1e-3)


def test_sqnr_is_given_per_output() -> None:
    a = normal(5, 3)
    found = compare([a, a], [a * 1.1, a * 1.01])
    assert found.sqnr_db == pytest.approx((20, 40), abs=1e-3)


def test_close_counts_values_within_a_hundredth_of_the_largest() -> None:
    a = torch.tensor([[100.0, 1.0, 1.0, 1.0]])
    b = torch.tensor([[100.9, 1.9, 2.1, 0.0]])
    assert compare([a], [b]).close == 0.75


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 1), (4,)])
def test_outputs_without_classes_have_no_top1_and_share_what_is_close(shape) -> None:
    a = normal(*shape)
    found = compare([a], [a + 100])
    assert found.top1 is None
    assert found.share == found.close == 0


def test_share_is_top1_where_there_are_classes() -> None:
    a = torch.eye(4)
    assert compare([a], [a * 3]).share == 1


def test_nan_in_the_file_is_the_worst_disagreement() -> None:
    a = normal(1, 4, 2)
    found = compare([a], [torch.full_like(a, torch.nan)])
    assert found.largest_difference == math.inf
    assert found.sqnr_db == (-math.inf,)
    assert found.share == 0


def test_the_same_infinities_agree() -> None:
    a = torch.tensor([[0.5, -torch.inf, torch.nan]])
    found = compare([a], [a.clone()])
    assert (found.largest_difference, found.close) == (0, 1)


def test_another_number_of_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare([normal(2, 2), normal(2, 2)], [normal(2, 2)])


def test_another_shape_is_refused() -> None:
    with pytest.raises(ExportError, match=r"\(4, 2\) and the file one of shape \(4, 3\)"):
        compare([normal(4, 2)], [normal(4, 3)])
