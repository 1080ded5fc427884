"""Cutting takes the right numbers out of the tensors and keeps the layers' attributes true."""

import copy

import numpy as np
import pytest
import torch
from models import conv, make
from torch import nn

from slimkit.errors import ArtifactError
from slimkit.pruning.coupling import Group, Member
from slimkit.pruning.removal import compose, cut, kept_positions, remove_


def member(tensor, channel, dim=0, role="out"):
    return Member(tensor, dim, role, torch.tensor(channel))


def test_kept_channels_become_positions_in_every_member():
    group = Group(
        "a", 3, (member("a.weight", [0, 1, 2]), member("b.weight", [0, 0, 1, 1, 2, 2], 1))
    )
    assert kept_positions([(group, torch.tensor([0, 2]))]) == {
        "a.weight": {0: [0, 2]},
        "b.weight": {1: [0, 1, 4, 5]},
    }


def test_positions_of_another_group_are_kept():
    group = Group("a", 2, (member("cat.weight", [-1, 0, 1, -1], 1, "in"),))
    assert kept_positions([(group, torch.tensor([1]))]) == {"cat.weight": {1: [0, 2, 3]}}


def test_two_groups_cut_one_tensor_together():
    first = Group("a", 2, (member("cat.weight", [0, 1, -1, -1], 1, "in"),))
    second = Group("b", 2, (member("cat.weight", [-1, -1, 0, 1], 1, "in"),))
    kept = [(first, torch.tensor([1])), (second, torch.tensor([0]))]
    assert kept_positions(kept) == {"cat.weight": {1: [1, 2]}}


def test_group_that_keeps_all_channels_cuts_nothing():
    group = Group("a", 2, (member("a.weight", [0, 1]),))
    assert kept_positions([(group, torch.tensor([0, 1]))]) == {}


def test_cut_takes_the_positions_that_numpy_takes():
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    expected = tensor.numpy()[:, [0, 2]][:, :, [1, 3]]
    assert np.array_equal(cut(tensor, {1: [0, 2], 2: [1, 3]}).numpy(), expected)


def test_cut_tensor_is_contiguous():
    assert cut(torch.zeros(4, 4), {1: [0, 2]}).is_contiguous()


def fitted(layer, kept):
    """A layer after cutting, with its own path in front of its tensors."""
    model = nn.Sequential(layer)
    remove_(model, {f"0.{name}": dims for name, dims in kept.items()})
    return layer


def test_convolution_knows_its_new_channels():
    layer = fitted(conv(3, 8), {"weight": {0: [0, 2], 1: [1]}, "bias": {0: [0, 2]}})
    assert (layer.out_channels, layer.in_channels, layer.groups) == (2, 1, 1)
    assert layer(torch.zeros(1, 1, 4, 4)).shape == (1, 2, 4, 4)


def test_depthwise_convolution_has_as_many_groups_as_channels():
    layer = fitted(conv(8, 8, groups=8), {"weight": {0: [1, 2, 7]}, "bias": {0: [1, 2, 7]}})
    assert (layer.out_channels, layer.in_channels, layer.groups) == (3, 3, 3)
    assert layer(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_transposed_convolution_knows_its_new_channels():
    layer = nn.ConvTranspose2d(4, 6, 2)
    fitted(layer, {"weight": {0: [0, 3], 1: [5]}, "bias": {0: [5]}})
    assert (layer.in_channels, layer.out_channels) == (2, 1)
    assert layer(torch.zeros(1, 2, 4, 4)).shape == (1, 1, 5, 5)


def test_grouped_convolution_that_is_not_cut_keeps_its_attributes():
    layer = conv(8, 4, groups=2)
    remove_(nn.Sequential(layer, conv(4, 4)), {"1.weight": {0: [0]}, "1.bias": {0: [0]}})
    assert (layer.in_channels, layer.out_channels, layer.groups) == (8, 4, 2)


def test_linear_knows_its_new_features():
    layer = fitted(nn.Linear(4, 3), {"weight": {0: [1], 1: [0, 3]}, "bias": {0: [1]}})
    assert (layer.out_features, layer.in_features) == (1, 2)


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_batch_norm_knows_its_new_features(options):
    layer = nn.BatchNorm2d(4, **options)
    sizes = {name: t for name, t in layer.state_dict().items() if t.dim()}
    fitted(layer, {name: {0: [0, 2]} for name in sizes})
    assert layer.num_features == 2


def test_layer_norm_knows_its_new_shape():
    layer = fitted(nn.LayerNorm(4), {"weight": {0: [0, 2, 3]}, "bias": {0: [0, 2, 3]}})
    assert layer.normalized_shape == (3,)


def test_prelu_knows_its_new_slopes():
    assert fitted(nn.PReLU(4), {"weight": {0: [0, 2]}}).num_parameters == 2


def test_parameters_stay_the_same_objects_without_their_gradients():
    layer = nn.Linear(4, 3)
    before = layer.weight
    layer(torch.ones(1, 4)).sum().backward()
    fitted(layer, {"weight": {0: [1]}, "bias": {0: [1]}})
    assert layer.weight is before
    assert before.grad is None


def test_tied_weights_are_cut_once_and_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    dims = {0: [1, 3], 1: [0, 1, 3]}
    remove_(model, {"0.weight": dims, "1.weight": dims})
    assert model[1].weight is model[0].weight
    assert model[0].weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"5.weight": {0: [0]}}, "no tensor '5.weight'"),
        ({"2.weight": {0: [0, 99]}}, "12 channels in dimension 0, but position 99"),
        ({"2.bias": {1: [0]}}, "0 channels in dimension 1"),
        ({"2.weight": {0: []}}, "position -1 should be kept"),
    ],
)
def test_positions_that_do_not_fit_are_an_error_and_nothing_is_cut(kept, message):
    model, _ = make("mlp")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArtifactError, match=message):
        remove_(model, {"0.weight": {0: [0]}, **kept})
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_compose_gives_positions_in_the_original():
    first = {"a": {0: [1, 3, 5]}, "b": {1: [0, 2]}}
    second = {"a": {0: [0, 2], 1: [4]}, "c": {0: [7]}}
    expected = {"a": {0: [1, 5], 1: [4]}, "b": {1: [0, 2]}, "c": {0: [7]}}
    assert compose(first, second) == expected


def test_compose_leaves_its_arguments_alone():
    first = {"a": {0: [1, 3]}}
    compose(first, {"a": {0: [1]}})
    assert first == {"a": {0: [1, 3]}}


def test_cutting_twice_equals_cutting_once_with_composed_positions():
    (once, _), (twice, _) = make("mlp"), make("mlp")
    first = {
        "0.weight": {0: [1, 3, 5, 8]},
        "0.bias": {0: [1, 3, 5, 8]},
        "2.weight": {1: [1, 3, 5, 8]},
    }
    second = {"0.weight": {0: [0, 3]}, "0.bias": {0: [0, 3]}, "2.weight": {1: [0, 3]}}
    remove_(twice, first)
    remove_(twice, second)
    remove_(once, compose(first, second))
    assert all(torch.equal(t, twice.state_dict()[name]) for name, t in once.state_dict().items())
