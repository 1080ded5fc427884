"""The order in which channels go, against orders written out by hand."""

from typing import get_args

import pytest
import torch
from models import make

from slimkit.pruning.coupling import Group
from slimkit.pruning.prune import analyse
from slimkit.pruning.rankings import RANKINGS, removals, structure
from slimkit.pruning.removal import tensors_by_name
from slimkit.recipe import Prune

A, B, C = Group("a", 2, ()), Group("b", 4, ()), Group("c", 4, ())
SCORES = {"a": [3.0, 1.0], "b": [2.0, 6.0, 5.0, 4.0], "c": [9.0, 8.0, 7.0, 10.0]}


def order(pools, **removable):
    scores = {name: torch.tensor(values) for name, values in SCORES.items()}
    return removals((A, B, C), pools, scores, {"a": 1, "b": 2, "c": 2, **removable})


def test_in_one_pool_the_least_important_channels_of_all_groups_go_first():
    gone = order({"a": "", "b": "", "c": ""}, a=2)
    assert [name for _, name in gone] == ["a", "b", "a", "b", "c", "c"]


def test_in_pools_of_their_own_groups_lose_the_same_fraction_at_any_time():
    assert order({"a": 1, "b": 2, "c": 3}) == [
        *((0.25, "b"), (0.25, "c")),
        *((0.5, "a"), (0.5, "b"), (0.5, "c")),
    ]


def test_pools_lose_the_same_fraction_and_inside_a_pool_the_least_important_goes_first():
    assert order({"a": "ab", "b": "ab", "c": "c"}) == [
        *((1 / 6, "a"), (0.25, "c"), (2 / 6, "b")),  # scores 1 and 2 of six channels
        *((0.5, "b"), (0.5, "c")),
    ]


def structures(name):
    model, inputs = make(name)
    shapes = {tensor: tuple(t.shape) for tensor, t in tensors_by_name(model).items()}
    return {g.name: structure(g, shapes) for g in analyse(model, inputs).groups}


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("mlp", [{"0", "2"}]),  # 16 and 12 channels
        ("grouped", [{"0", "2", "4"}]),
        ("concatenation", [{"a", "b"}]),
        ("chain", [{"0"}, {"3"}]),  # read by a convolution, and by a linear layer
        ("functional_call", [{"a", "b"}, {"c"}]),
        ("residual", [{"stem"}, {"down"}]),  # three convolutions, and one
        ("transposed", [{"0"}, {"2"}]),
        ("depthwise", [{"0"}, {"5"}]),
    ],
)
def test_groups_are_of_one_structure_if_their_layers_are_whatever_their_channels(name, alike):
    kinds = structures(name)
    assert set(kinds) == set.union(*alike)
    assert len(set(kinds.values())) == len(alike)
    assert all(len({kinds[group] for group in same}) == 1 for same in alike)


def test_kernel_sizes_make_structures_differ():
    shapes = {"a.weight": (8, 3, 3, 3), "b.weight": (8, 3, 1, 1)}
    member = analyse(*make("flipped")).groups[0].members[0]
    small, large = (
        Group(n, 8, (type(member)(f"{n}.weight", 0, "out", torch.arange(8)),)) for n in "ab"
    )
    assert structure(small, shapes) != structure(large, shapes)


def test_rankings_are_those_of_the_recipe():
    assert get_args(Prune.model_fields["ranking"].annotation) == tuple(RANKINGS)
