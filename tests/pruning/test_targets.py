"""A target is one measure with a value in its range."""

import math

import pytest

from slimkit.errors import PruningError
from slimkit.pruning.targets import Target


@pytest.mark.parametrize(("measure", "value"), [("size_mb", 25), ("importance", 0.9)])
def test_target_reads_size_and_importance(measure, value):
    assert Target.of({measure: value}) == Target(measure, value)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "3"], ids=str)
def test_size_that_is_not_above_zero_is_refused(value):
    with pytest.raises(PruningError, match="target.size_mb must be a number above 0"):
        Target.of({"size_mb": value})


@pytest.mark.parametrize("value", [0, 1, -0.5, math.nan, True], ids=str)
def test_importance_outside_zero_to_one_is_refused(value):
    with pytest.raises(PruningError, match="target.importance must be a number between 0 and 1"):
        Target.of({"importance": value})


def test_half_of_the_way_to_a_size_lies_between_the_dense_and_it():
    assert Target("size_mb", 4.0).milder(0.5, dense=10.0) == Target("size_mb", 7.0)


def test_half_of_the_way_to_an_importance_loses_half_of_what_it_loses():
    assert Target("importance", 0.8).milder(0.5) == Target("importance", 0.9)
