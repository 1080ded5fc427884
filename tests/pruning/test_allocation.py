"""The allocation is near the best there is, within the cost, and the cost is the cost model's."""

import itertools

import pytest
import torch
from models import PRUNABLE, make

from slimkit.errors import PruningError
from slimkit.pruning.allocation import allocate
from slimkit.pruning.prune import analyse
from slimkit.pruning.selection import Selector, Target
from slimkit.pruning.sensitivity import Curve, Point
from slimkit.pruning.size_costs import SizeCosts

SIZES = {"a": [1, 2, 4, 6, 8], "b": [2, 4, 8], "c": [1, 2, 3, 4]}


def cost(sizes):
    """A chain of layers: the cost of each is the product of what it reads and makes."""
    return 3 * sizes["a"] + sizes["a"] * sizes["b"] + sizes["b"] * sizes["c"] + 5 * sizes["c"]


def losses(seed):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, sizes in SIZES.items():
        steps = torch.rand(len(sizes) - 1, generator=draw).pow(3).cumsum(0).tolist()
        found[name] = dict(zip(sizes[::-1], [0.0, *steps], strict=True))
    return found


def brute_force(loss, limit):
    choices = [
        dict(zip(SIZES, chosen, strict=True)) for chosen in itertools.product(*SIZES.values())
    ]
    return min(
        sum(loss[g][n] for g, n in chosen.items()) for chosen in choices if cost(chosen) <= limit
    )


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_allocation_is_the_best_of_all_or_near_it(share):
    limit = share * cost({name: max(own) for name, own in SIZES.items()})
    exact = 0
    for seed in range(40):
        loss = losses(seed)
        found = allocate(SIZES, lambda g, n, loss=loss: loss[g][n], cost, limit)
        assert cost(found) <= limit
        total, best = sum(loss[g][n] for g, n in found.items()), brute_force(loss, limit)
        exact += total <= best + 1e-9
        assert total <= best * 1.5 + 0.05
    assert exact >= 32


def test_a_hand_made_choice_takes_what_is_free_and_leaves_what_is_dear():
    loss = {"a": {8: 0, 6: 0, 4: 0.0, 2: 0.01, 1: 5}, "b": {8: 0, 4: 2, 2: 3}}
    loss["c"] = {4: 0, 3: 1, 2: 2, 1: 3}
    found = allocate(SIZES, lambda g, n: loss[g][n], cost, 0.7 * cost({"a": 8, "b": 8, "c": 4}))
    assert found == {"a": 4, "b": 8, "c": 4}
    assert brute_force(loss, 0.7 * cost({"a": 8, "b": 8, "c": 4})) == 0


def test_where_nothing_has_to_go_nothing_goes():
    assert allocate(SIZES, lambda *_: 0.0, cost, 1e9) == {n: max(own) for n, own in SIZES.items()}


def of(name):
    model, inputs = make(name)
    return model, inputs, analyse(model, inputs)


def curves_of(coupling, steep=()):
    return [
        Curve(
            g.name,
            (),
            g.channels,
            tuple(
                Point(r, int(g.channels * r), r**2 * (100 if g.name in steep else 1), 0.0, 1)
                for r in (0.25, 0.5, 0.75)
            ),
        )
        for g in coupling.groups
    ]


@pytest.mark.parametrize("name", sorted(PRUNABLE))
@pytest.mark.parametrize("measure", ["flops", "params"])
def test_cost_of_sizes_is_the_cost_models(name, measure):
    model, inputs, coupling = of(name)
    chooser = Selector(model, coupling, inputs)
    kept = {
        (g.name, n): torch.arange(n)
        for g in coupling.groups
        for n in (g.channels, max(1, g.channels // 2), 1)
    }
    costs = SizeCosts(chooser.cost, coupling.groups, kept, measure)
    for part in (1, 2, 100):
        sizes = {g.name: max(1, g.channels // part) for g in coupling.groups}
        removed = chooser.counting.removed({n: kept[n, k] for n, k in sizes.items()})
        wanted = chooser.cost.predict(removed)[0 if measure == "flops" else 1]
        assert costs(sizes) == pytest.approx(wanted)


@pytest.mark.parametrize("measure", ["flops", "params"])
@pytest.mark.parametrize("value", [0.4, 0.8])
def test_choice_by_curves_is_within_the_target_and_close_to_it(measure, value):
    model, inputs, coupling = of("chain")
    chooser = Selector(model, coupling, inputs, curves=curves_of(coupling))
    scores = {g.name: torch.rand(g.channels) for g in coupling.groups}
    choice = chooser.choose(scores, Target(measure, value))
    reached = {
        "flops": choice.macs / chooser.dense_macs,
        "params": choice.parameters / chooser.dense_parameters,
    }[measure]
    assert value - 0.13 < reached <= value


def test_the_group_whose_curve_is_steep_keeps_its_channels():
    model, inputs, coupling = of("mlp")
    ones = {g.name: torch.ones(g.channels) for g in coupling.groups}
    left = {}
    for steep in ("0", "2"):
        chooser = Selector(model, coupling, inputs, curves=curves_of(coupling, {steep}))
        kept = chooser.choose(ones, Target("flops", 0.6)).kept
        left[steep] = {name: len(stay) / len(ones[name]) for name, stay in kept.items()}
    assert left["0"]["0"] > 0.9 > left["0"]["2"]
    assert left["2"]["2"] > 0.9 > left["2"]["0"]


def test_milder_steps_never_bring_a_channel_back():
    model, inputs, coupling = of("residual")
    chooser = Selector(model, coupling, inputs, curves=curves_of(coupling))
    scores = {g.name: torch.rand(g.channels).double() for g in coupling.groups}
    before = None
    for progress in (0.3, 0.6, 1.0):
        kept = chooser.choose(scores, Target("flops", 0.4), progress=progress).kept
        for name, stay in kept.items():
            assert before is None or set(stay.tolist()) <= set(before[name].tolist())
            dead = torch.ones(len(scores[name]), dtype=torch.bool)
            dead[stay] = False
            scores[name] = torch.rand(len(dead)).double().masked_fill(dead, -1.0)
        before = kept


def test_a_target_behind_the_last_ratio_can_still_be_reached():
    model, inputs, coupling = of("chain")
    chooser = Selector(model, coupling, inputs, curves=curves_of(coupling))
    scores = {g.name: torch.rand(g.channels) for g in coupling.groups}
    assert chooser.choose(scores, Target("flops", 0.15)).macs <= 0.15 * chooser.dense_macs
    with pytest.raises(PruningError, match="cannot be reached"):
        chooser.choose(scores, Target("flops", 0.001))


def test_curves_of_another_model_are_refused():
    model, inputs, coupling = of("chain")
    with pytest.raises(PruningError, match="no curve of 3 with 6 channels: it is of another model"):
        Selector(model, coupling, inputs, curves=curves_of(of("chain")[2])[:1])
