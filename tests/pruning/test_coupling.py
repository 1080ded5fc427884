"""The analysis finds which tensors share channels, and says why others must stay whole."""

import pytest
import torch
from models import (
    PRUNABLE,
    Net,
    concatenation,
    conv,
    depthwise,
    functional_call,
    grouped,
    make,
    residual,
)
from torch import nn
from torch.nn import functional

from slimkit.errors import PruningError
from slimkit.pruning.engines import find_groups

IMAGE = torch.zeros(1, 3, 8, 8)


def group(model, name, *inputs):
    (found,) = [g for g in find_groups(model, inputs or (IMAGE,)).groups if g.name == name]
    return found


def places(found):
    """(tensor, dimension) of each weight that a group's channels live in."""
    return {(m.tensor, m.dim) for m in found.members if m.tensor.endswith("weight")}


def test_chain_couples_a_layer_its_norm_and_its_reader():
    model, inputs = make("chain")
    found = group(model, "0", *inputs)
    assert {(m.tensor, m.dim, m.role) for m in found.members} == {
        ("0.weight", 0, "out"),
        ("0.bias", 0, "out"),
        ("1.weight", 0, "out"),
        ("1.bias", 0, "out"),
        ("1.running_mean", 0, "out"),
        ("1.running_var", 0, "out"),
        ("3.weight", 1, "in"),
    }


def test_flattened_channel_lives_at_each_of_its_pixels():
    model, inputs = make("chain")
    (reader,) = [m for m in group(model, "3", *inputs).members if m.tensor == "7.weight"]
    assert reader.channel.tolist() == [c for c in range(6) for _ in range(64)]


def test_residual_stream_is_one_group_named_by_its_first_layer():
    assert places(group(residual(), "stem")) == {
        ("stem.weight", 0),
        ("bn0.weight", 0),
        ("down.weight", 1),
        ("up.weight", 0),
        ("bn2.weight", 0),
        ("more.weight", 0),
        ("more.weight", 1),
        ("head.weight", 1),
    }


def test_positions_behind_a_concatenation_belong_to_one_branch_each():
    first, second = (
        next(m.channel for m in group(concatenation(), name).members if m.tensor == "head.weight")
        for name in ("a", "b")
    )
    assert first.tolist() == [*range(8), *[-1] * 6]
    assert second.tolist() == [*[-1] * 8, *range(6)]


def test_depthwise_convolution_shares_the_channels_that_it_reads():
    assert places(group(depthwise(), "0")) == {
        ("0.weight", 0),
        ("1.weight", 0),
        ("3.weight", 0),
        ("5.weight", 1),
    }


def test_transposed_convolution_reads_in_dimension_0_and_makes_in_dimension_1():
    model, inputs = make("transposed")
    assert places(group(model, "0", *inputs)) == {("0.weight", 0), ("2.weight", 0)}
    assert places(group(model, "2", *inputs)) == {("2.weight", 1), ("4.weight", 1)}


def test_prelu_with_a_slope_per_channel_goes_along():
    model, inputs = make("prelu")
    assert ("1.weight", 0) in places(group(model, "0", *inputs))


def test_single_prelu_slope_is_left_alone():
    model = nn.Sequential(conv(3, 4), nn.PReLU(), conv(4, 2))
    assert ("1.weight", 0) not in places(group(model, "0"))


@pytest.mark.parametrize("name", PRUNABLE)
def test_no_position_of_a_tensor_belongs_to_two_groups(name):
    taken = {}
    for found in find_groups(*make(name)).groups:
        for key, channel in {(m.tensor, m.dim): m.channel for m in found.members}.items():
            taken[key] = taken.get(key, 0) + (channel >= 0).int()
    assert all((count <= 1).all() for count in taken.values())


@pytest.mark.parametrize("name", PRUNABLE)
def test_each_channel_of_a_group_lives_in_each_of_its_full_members(name):
    for found in find_groups(*make(name)).groups:
        for member in found.members:
            if member.role == "out" and (member.channel >= 0).all():
                assert set(member.channel.tolist()) == {*range(found.channels)}


@pytest.mark.parametrize("name", PRUNABLE)
def test_group_names_are_unique(name):
    names = [g.name for g in find_groups(*make(name)).groups]
    assert len(set(names)) == len(names)


def test_batch_norm_right_behind_a_layer_is_known_for_each_layer():
    norms = {m.tensor: m.norm for m in group(residual(), "stem").members}
    assert (norms["stem.weight"], norms["up.weight"], norms["more.weight"]) == ("bn0", "bn2", "")


def test_second_engine_leaves_grouped_convolutions_and_what_they_read_whole():
    frozen = find_groups(grouped(), (IMAGE,), "torch-pruning").frozen
    assert (frozen["0"], frozen["2"]) == ("2 (Conv2d) cannot be cut",) * 2


def test_second_engine_names_the_layer_with_parameters_of_unknown_kind():
    model = nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 4))
    frozen = find_groups(model, (IMAGE,), "torch-pruning").frozen
    assert frozen["0"] == "1 (GroupNorm) cannot be cut"


def test_second_engine_names_a_free_parameter_on_the_way():
    def flow(net, x):
        return net.b(functional.conv2d(net.a(x), net.free))

    model = Net(flow, a=conv(3, 8), b=conv(4, 2))
    model.free = nn.Parameter(torch.ones(4, 8, 1, 1))
    frozen = find_groups(model, (IMAGE,), "torch-pruning").frozen
    assert "parameter outside any known layer" in frozen["a"]


def test_weight_that_a_functional_call_reads_belongs_to_what_feeds_it():
    assert ("b.weight", 1) in places(group(functional_call(), "a"))
    assert "a" in find_groups(functional_call(), (IMAGE,), "torch-pruning").frozen


def test_frozen_parameters_are_analysed_and_stay_frozen():
    model, inputs = make("mlp")
    model.requires_grad_(False)
    assert [g.name for g in find_groups(model, inputs).groups] == ["0", "2"]
    assert not any(p.requires_grad for p in model.parameters())


def test_analysis_leaves_the_model_as_it_was():
    model, inputs = make("residual")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_groups(model, inputs)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_model_that_fails_on_its_inputs_cannot_be_traced():
    with pytest.raises(PruningError, match=r"Linear cannot be traced.*model\(\*example_inputs\)"):
        find_groups(nn.Linear(3, 2), (torch.zeros(1, 7),))
