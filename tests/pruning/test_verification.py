"""A group is cut only if cutting it is proven right on an example."""

import copy
import re

import pytest
import torch
from models import PRUNABLE, Net, chunked, flipped, make
from torch import nn
from torch.nn import functional

from slimkit.pruning.coupling import Coupling, Group
from slimkit.pruning.engines import find_groups
from slimkit.pruning.verification import verified

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))


def checked(model, *inputs):
    return verified(model, find_groups(model, inputs), inputs)


def misread(model, *inputs):
    """Verify groups that say that every layer reads its channels in reverse."""
    coupling = find_groups(model, inputs)
    for group in coupling.groups:
        for member in group.members:
            if member.role == "in":
                member.channel.copy_(member.channel.flip(0))
    return verified(model, coupling, inputs)


def names(coupling):
    return [g.name for g in coupling.groups]


@pytest.mark.parametrize(
    ("model", "good"),
    [
        ("chain", ["0", "3"]),
        ("mlp", ["0", "2"]),
        ("residual", ["stem", "down"]),
        ("concatenation", ["a", "b"]),
        ("depthwise", ["0", "5"]),
        ("squeeze_excite", ["stem", "squeeze"]),
        ("sigmoid_chain", ["0"]),
        ("layernorm_mlp", ["0"]),
        ("transposed", ["0", "2"]),
        ("two_inputs", ["a"]),
        ("shared", ["a"]),
    ],
)
def test_right_groups_pass(model, good):
    model, inputs = make(model)
    assert names(checked(model, *inputs)) == good


@pytest.mark.parametrize("name", PRUNABLE)
def test_layers_that_make_the_output_are_frozen(name):
    model, inputs = make(name)
    last = [path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    assert checked(model, *inputs).frozen[last] == "its channels are the model's output"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_right_groups_pass_in_other_precisions(dtype):
    model, inputs = make("residual", dtype=dtype)
    assert names(checked(model, *inputs)) == ["stem", "down"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_errors_of_a_deep_network_are_no_reason(dtype):
    torch.manual_seed(0)
    layers = [layer for _ in range(24) for layer in (nn.Linear(64, 64), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(64, 2)).to(dtype).eval()
    assert len(checked(model, torch.randn(2, 64).to(dtype)).groups) == 24
    assert model[0].weight.dtype == dtype


def test_a_network_that_only_runs_in_half_precision_is_verified_in_it():
    def flow(net, x):
        return net.c(net.b(functional.linear(net.a(x), torch.eye(4, dtype=torch.bfloat16))))

    layers = {"a": nn.Linear(8, 4), "b": nn.Linear(4, 6), "c": nn.Linear(6, 2)}
    model = Net(flow, **layers).to(torch.bfloat16).eval()
    assert names(checked(model, X.to(torch.bfloat16))) == ["b"]


@pytest.mark.parametrize("x", [X, torch.zeros(2, 8), torch.ones(2, 8)], ids=["noise", "0", "1"])
def test_channels_read_in_another_order_than_analysed_are_frozen(x):
    coupling = misread(flipped(), x)
    assert "changes the output" in coupling.frozen["a"]
    assert names(coupling) == []


@pytest.fixture
def halves():
    """A model and groups that do not know that the channels of `stem` are read in two halves."""
    model = chunked()
    return model, find_groups(model, (X,), "torch-pruning")


def test_channels_that_are_split_evenly_behind_are_frozen(halves):
    assert "changes the output" in verified(*halves, (X,)).frozen["stem"]


def test_wrong_group_does_not_freeze_the_right_ones(halves):
    assert names(verified(*halves, (X,))) == ["a"]


def test_reasons_are_one_line(halves):
    assert not any(re.search("\n", reason) for reason in verified(*halves, (X,)).frozen.values())


def test_group_that_forgets_a_reader_is_frozen():
    model, inputs = make("mlp")
    coupling = find_groups(model, inputs)
    first = coupling.groups[0]
    short = Group(first.name, first.channels, first.members[:-1])
    assert "does not run" in verified(model, Coupling((short,), {}), inputs).frozen["0"]


def test_group_that_reads_the_wrong_positions_is_frozen():
    model, inputs = make("sigmoid_chain")
    coupling = find_groups(model, inputs)
    first = coupling.groups[0]
    for member in first.members:
        if member.role == "in":
            member.channel.copy_(member.channel.roll(1))
    found = verified(model, Coupling((first,), {}), inputs)
    assert "changes the output" in found.frozen["0"]


def test_normalization_over_a_fixed_number_of_channels_is_frozen():
    def flow(net, x):
        x = net.a(x)
        return net.b(x - x.sum(1, keepdim=True) / 8 + torch.arange(x.shape[1]))

    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 4)}
    groups = find_groups(Net(lambda net, x: net.b(net.a(x)), **layers), (X,))
    assert "changes the output" in verified(Net(flow, **layers), groups, (X,)).frozen["a"]


def test_infinite_outputs_prove_nothing_by_themselves():
    def flow(net, x):
        return torch.cat([net.b(net.a(x).flip(1)), torch.full((len(x), 1), float("inf"))], 1)

    model = Net(flow, a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    assert "changes the output" in misread(model, X).frozen["a"]


def test_earlier_reasons_are_kept():
    model, inputs = make("mlp")
    groups = find_groups(model, inputs).groups
    assert verified(model, Coupling(groups, {"x": "why"}), inputs).frozen["x"] == "why"


def test_verification_leaves_the_model_as_it_was():
    model, inputs = make("residual")
    model.train()
    before = copy.deepcopy(model.state_dict())
    checked(model, *inputs)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_groups_that_fit_only_while_they_lose_the_same_share_are_frozen():
    def flow(net, x):
        x = net.a(x)
        return net.z(net.b(x).reshape(len(x), 2, x.shape[1] // 2).flatten(1))

    coupling = checked(Net(flow, a=nn.Linear(8, 8), b=nn.Linear(8, 8), z=nn.Linear(8, 4)), X)
    assert names(coupling) == []
    assert "does not run" in coupling.frozen["a"]
    assert "does not run" in coupling.frozen["b"]


def test_wrong_order_is_found_where_the_head_is_still_all_zero():
    model = flipped()
    model.b.weight.data.zero_()
    assert "changes the output" in misread(model, X).frozen["a"]
    assert not model.b.weight.any()


def test_wrong_order_of_a_norm_is_found_where_it_was_never_trained():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).eval()
    coupling = find_groups(model, (X,))
    for member in coupling.groups[0].members:
        if member.tensor.startswith("1."):
            member.channel.copy_(member.channel.flip(0))
    assert "changes the output" in verified(model, coupling, (X,)).frozen["0"]
    assert (model[1].weight == 1).all()


def auxiliary(side):
    """A classifier with a second head that runs in training mode only."""

    def flow(net, x):
        x = functional.relu(net.a(x))
        out = net.head(functional.relu(net.b(x)))
        return (out, net.aux(side(x))) if net.training else out

    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 6), "head": nn.Linear(6, 4)}
    return Net(flow, **layers, aux=nn.Linear(8, 4))


def test_heads_for_the_training_only_are_cut_along_with_what_they_read():
    model = auxiliary(lambda x: x).eval()
    coupling = checked(model, X)
    (group,) = [g for g in coupling.groups if g.name == "a"]
    assert ("aux.weight", 1) in {(m.tensor, m.dim) for m in group.members}
    assert coupling.frozen["aux"] == "its channels are the model's output"
    assert names(coupling) == ["a", "b"]


def test_head_for_the_training_only_that_needs_two_samples_is_cut_along():
    model = auxiliary(lambda x: functional.batch_norm(x, None, None, training=True)).eval()
    assert ("aux.weight", 1) in {(m.tensor, m.dim) for m in checked(model, X[:1]).groups[0].members}


def test_group_that_a_head_for_the_training_only_cannot_lose_is_frozen():
    def untraceable(x):  # torch.export cannot follow numbers into Python
        return x if x.sum().item() > -1e9 else -x

    coupling = checked(auxiliary(untraceable).eval(), X)
    assert "does not run in training mode" in coupling.frozen["a"]
    assert names(coupling) == ["b"]
