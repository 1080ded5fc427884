"""Dead channels are zero in every coupled layer, and stay dead."""

import copy

import pytest
import torch
from models import make

from slimkit.pruning.coupling import Coupling
from slimkit.pruning.engines import find_groups
from slimkit.pruning.masks import Masks
from slimkit.pruning.prune import analyse
from slimkit.pruning.removal import kept_positions, remove_


@pytest.fixture
def chain():
    model, inputs = make("chain")
    return model, find_groups(model, inputs)


def test_all_channels_live_at_first(chain):
    assert {name: len(kept) for name, kept in Masks(chain[1]).kept.items()} == {
        "0": 8,
        "3": 6,
    }


def test_given_channels_live_and_other_groups_are_whole(chain):
    masks = Masks(chain[1], {"0": torch.tensor([1, 2])})
    assert {name: len(kept) for name, kept in masks.kept.items()} == {"0": 2, "3": 6}


def test_nothing_changes_while_all_channels_live(chain):
    model, coupling = chain
    before = copy.deepcopy(model.state_dict())
    Masks(coupling).apply_(model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_dead_channels_are_zero_where_they_are_made_scaled_and_read(chain):
    model, coupling = chain
    before = {name: t.clone() for name, t in model.state_dict().items()}
    dead, live = [0, 2, 3, 4, 6], [1, 5, 7]
    Masks(coupling, {"0": torch.tensor(live)}).apply_(model)
    for name, dim in [
        ("0.weight", 0),
        ("0.bias", 0),
        ("1.weight", 0),
        ("1.bias", 0),
        ("3.weight", 1),
    ]:
        now = model.state_dict()[name].movedim(dim, 0)
        assert not now[dead].any(), name
        assert torch.equal(now[live], before[name].movedim(dim, 0)[live]), name


def test_statistics_of_dead_channels_are_left_alone(chain):
    model, coupling = chain
    before = model[1].running_mean.clone(), model[1].running_var.clone()
    Masks(coupling, {"0": torch.tensor([1])}).apply_(model)
    assert torch.equal(before[0], model[1].running_mean)
    assert torch.equal(before[1], model[1].running_var)


def test_columns_of_another_branch_are_left_alone():
    model, inputs = make("concatenation")
    before = model.head.weight.clone()
    Masks(find_groups(model, inputs), {"a": torch.tensor([0])}).apply_(model)
    assert not model.head.weight[:, 1:8].any()
    assert torch.equal(model.head.weight[:, 8:], before[:, 8:])


def test_nothing_arrives_at_the_readers_of_dead_channels():
    model, inputs = make("residual")
    Masks(find_groups(model, inputs), {"stem": torch.tensor([0, 3, 6])}).apply_(model)
    masked = model(*inputs)
    model.head.weight.data[:, [1, 2, 4, 5, 7]] = 9.0
    assert torch.equal(model(*inputs), masked)


@pytest.mark.parametrize("name", ["chain", "residual", "concatenation", "sigmoid_chain"])
def test_masked_model_gives_what_the_cut_model_gives(name):
    model, inputs = make(name)
    coupling = Coupling(analyse(model, inputs).groups, {})
    kept = {g.name: torch.arange(1, g.channels, 3) for g in coupling.groups}
    Masks(coupling, kept).apply_(model)
    masked = model(*inputs)
    remove_(model, kept_positions((g, kept[g.name]) for g in coupling.groups))
    assert torch.allclose(model(*inputs), masked, atol=1e-5)


def test_parameters_stay_leaves_with_their_gradients(chain):
    model, coupling = chain
    model[0].weight.grad = torch.ones_like(model[0].weight)
    Masks(coupling, {"0": torch.tensor([1])}).apply_(model)
    assert model[0].weight.is_leaf
    assert model[0].weight.grad.all()


def test_dead_channels_rank_below_every_living_one(chain):
    masks = Masks(chain[1], {"3": torch.tensor([1, 4])})
    scores = {g.name: torch.zeros(g.channels).double() for g in chain[1].groups}
    silenced = masks.silence(scores)
    assert silenced["3"].tolist() == [-1, 0, -1, -1, 0, -1]
    assert silenced["0"].tolist() == [0] * 8


def test_silence_leaves_the_given_scores_alone(chain):
    scores = {g.name: torch.ones(g.channels).double() for g in chain[1].groups}
    Masks(chain[1], {"3": torch.tensor([1])}).silence(scores)
    assert scores["3"].tolist() == [1.0] * 6
