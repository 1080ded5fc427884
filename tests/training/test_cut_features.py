"""Which channels stayed at a place is told on networks of several kinds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import normal
from torch import Tensor, nn
from torch.nn import functional

import slimkit
from slimkit.places import Place
from slimkit.pruning.removal import cut
from slimkit.training.cut_features import features, kept_channels, since


class Residual(nn.Module):
    """A stream that two convolutions write to, in front of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.merged = nn.Sequential(nn.Identity())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.stem(x)
        x = self.merged(functional.relu(x + self.stage(x)))
        return {"logits": self.fc(x.mean((2, 3)))}


class Tokens(nn.Module):
    """Two linear layers over tokens; channels are the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.up = nn.Sequential(nn.Linear(6, 16), nn.GELU())
        self.down = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.embed(x)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 3)
    )


CASES = {
    "residual": (Residual, normal(1, 3, 6, 6), "merged", "stem.weight", 1),
    "its branch": (Residual, normal(1, 3, 6, 6), "stage", "stem.weight", 1),
    "perceptron": (mlp, normal(1, 5), "1", "0.weight", 1),
    "sigmoid": (mlp, normal(1, 5), "3", "2.weight", 1),
    "tokens": (Tokens, torch.arange(7)[None], "up", "up.0.weight", 2),
}


@pytest.mark.parametrize(("build", "x", "at", "weight", "dim"), CASES.values(), ids=CASES)
def test_the_channels_that_stayed_are_those_of_the_weight_that_makes_them(
    build, x, at, weight, dim
) -> None:
    torch.manual_seed(0)
    dense = build()
    options = {"protect_first": False, "protect": ["embed"] if build is Tokens else []}
    target = {"ratio": 0.4}
    small = slimkit.prune(dense, x, target=target, round_to=1, criterion="random", **options)
    report = small.slimkit_pruning
    place = Place.of(at, [name for name, _ in dense.named_modules()])
    state = copy.deepcopy(dense.state_dict())
    found = kept_channels(dense, report.kept, report.attributes, [place], (x,))
    assert found == {at: (dim, report.kept[weight][0])}
    assert all(torch.equal(v, state[k]) for k, v in dense.state_dict().items())


def test_a_whole_place_is_not_among_them() -> None:
    x = normal(1, 5)
    small = slimkit.prune(mlp(), x, target={"ratio": 0.4}, round_to=1)
    report = small.slimkit_pruning
    place = Place.of("output", [])
    assert kept_channels(mlp(), report.kept, report.attributes, [place], (x,)) == {}


def test_of_a_network_that_was_cut_before_positions_count_in_it() -> None:
    x = normal(1, 5)
    once = slimkit.prune(mlp(), x, target={"ratio": 0.3}, round_to=1, criterion="random")
    twice = slimkit.prune(once, x, target={"ratio": 0.3}, round_to=1, criterion="random")
    now = since(once.slimkit_pruning.kept, twice.slimkit_pruning.kept)
    found = kept_channels(once, now, {}, [Place.of("1", ["1"])], (x,))
    dim, positions = found["1"]
    assert dim == 1
    expected = cut(once[0].weight, {0: positions})
    assert torch.equal(twice[0].weight, expected)
    assert 0 < len(positions) < once[0].out_features


def test_features_are_those_of_evaluation_and_change_nothing() -> None:
    net = Residual().train()
    x = normal(2, 3, 6, 6)
    before = copy.deepcopy(net.state_dict())
    given = features(net, [Place.of("output.logits", [])], (x,))
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(given["output.logits"], net.eval()(x)["logits"])
