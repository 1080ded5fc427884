"""The channels that stay are the best ones, and as many as the target allows."""

import math

import pytest
import torch
from models import grouped, make
from torch.utils.flop_counter import FlopCounterMode

from slimkit.errors import PruningError
from slimkit.pruning.prune import analyse
from slimkit.pruning.selection import Selector, Target


def selector(name="chain", **options):
    model, inputs = make(name)
    return Selector(model, analyse(model, inputs), inputs, **options)


def scores_of(chooser, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        g.name: torch.rand(g.channels, generator=generator).double()
        for g in chooser.coupling.groups
    }


@pytest.mark.parametrize("measure", ["flops", "params", "ratio"])
def test_target_reads_its_one_measure(measure):
    assert Target.of({measure: 0.25}) == Target(measure, 0.25)


def test_target_leaves_out_measures_that_are_none():
    assert Target.of({"flops": None, "params": 0.5}) == Target("params", 0.5)


@pytest.mark.parametrize(
    "target", [{}, {"flops": 0.5, "params": 0.5}, {"speed": 0.5}, {"flops": None}], ids=str
)
def test_target_without_exactly_one_known_measure_is_refused(target):
    with pytest.raises(PruningError, match="exactly one of flops, params, ratio"):
        Target.of(target)


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5, math.nan, math.inf, "0.5", True], ids=str)
def test_target_outside_zero_to_one_is_refused(value):
    with pytest.raises(PruningError, match="target.flops must be a number between 0 and 1"):
        Target.of({"flops": value})


@pytest.mark.parametrize("target", [0.5, "flops", [("flops", 0.5)]], ids=str)
def test_target_that_is_no_mapping_is_refused(target):
    with pytest.raises(PruningError, match="target must be such as"):
        Target.of(target)


@pytest.mark.parametrize(
    ("target", "progress", "value"),
    [
        (Target("flops", 0.4), 0, 1.0),
        (Target("flops", 0.4), 0.5, 0.7),
        (Target("params", 0.4), 1, 0.4),
        (Target("ratio", 0.4), 0, 0.0),
        (Target("ratio", 0.4), 0.5, 0.2),
    ],
)
def test_milder_target_lies_on_the_way_from_the_dense_model(target, progress, value):
    assert target.milder(progress).value == pytest.approx(value)


@pytest.mark.parametrize("measure", ["flops", "params"])
@pytest.mark.parametrize("value", [0.3, 0.5, 0.8])
def test_choice_is_within_the_target_by_its_prediction(measure, value):
    chooser = selector()
    choice = chooser.choose(scores_of(chooser), Target(measure, value))
    cost, dense = {
        "flops": (choice.macs, chooser.dense_macs),
        "params": (choice.parameters, chooser.dense_parameters),
    }[measure]
    assert cost <= value * dense


def test_one_channel_more_would_miss_the_target():
    chooser = selector("mlp")
    scores = scores_of(chooser)
    kept = chooser.choose(scores, Target("flops", 0.5)).kept
    dead = {name: score.clone().index_fill(0, kept[name], -1.0) for name, score in scores.items()}
    revived = max(dead, key=lambda name: dead[name].max())
    sizes = {name: len(stay) + (name == revived) for name, stay in kept.items()}
    macs = 2 * (8 * sizes["0"] + sizes["0"] * sizes["2"] + 4 * sizes["2"])  # two samples
    assert macs > 0.5 * chooser.dense_macs


@pytest.mark.parametrize("measure", ["flops", "params", "ratio"])
def test_what_stays_in_a_group_scores_higher_than_what_goes(measure):
    chooser = selector()
    scores = scores_of(chooser)
    for name, stay in chooser.choose(scores, Target(measure, 0.5)).kept.items():
        gone = scores[name].clone().index_fill(0, stay, -1.0).max()
        assert gone < scores[name][stay].min()


def test_groups_are_ranked_together():
    chooser = selector("mlp")
    scores = {"0": torch.ones(16).double(), "2": torch.full((12,), 0.5).double()}
    kept = chooser.choose(scores, Target("flops", 0.9)).kept
    assert (len(kept["0"]), len(kept["2"]) < 12) == (16, True)


def test_ratio_takes_the_same_fraction_from_every_group():
    chooser = selector("mlp")
    kept = chooser.choose(scores_of(chooser), Target("ratio", 0.25)).kept
    assert (len(kept["0"]), len(kept["2"])) == (12, 9)


def test_ratio_near_one_leaves_one_channel():
    chooser = selector("mlp")
    kept = chooser.choose(scores_of(chooser), Target("ratio", 0.99)).kept
    assert (len(kept["0"]), len(kept["2"])) == (1, 1)


def test_ratio_of_odd_groups_removes_no_more_than_the_fraction():
    chooser = selector("mlp")
    assert len(chooser.choose(scores_of(chooser), Target("ratio", 0.3)).kept["0"]) == 12  # of 11.2


@pytest.mark.parametrize("measure", ["flops", "params", "ratio"])
@pytest.mark.parametrize("multiple", [2, 4])
def test_kept_channels_are_a_multiple(measure, multiple):
    chooser = selector("mlp", round_to=multiple)
    kept = chooser.choose(scores_of(chooser), Target(measure, 0.6)).kept
    assert [len(stay) % multiple for stay in kept.values()] == [0, 0]


def test_group_smaller_than_the_multiple_stays_whole():
    chooser = selector("mlp", round_to=32)
    kept = chooser.choose(scores_of(chooser), Target("ratio", 0.5)).kept
    assert (len(kept["0"]), len(kept["2"])) == (16, 12)


@pytest.mark.parametrize("target", [Target("flops", 0.45), Target("ratio", 0.9)], ids=str)
def test_no_group_gets_smaller_than_min_channels(target):
    chooser = selector("mlp", min_channels=7)
    scores = {"0": torch.full((16,), 1e-9).double(), "2": torch.ones(12).double()}
    assert len(chooser.choose(scores, target).kept["0"]) == 7


def test_kept_channels_are_sorted():
    chooser = selector()
    kept = chooser.choose(scores_of(chooser), Target("flops", 0.5)).kept
    assert all(stay.tolist() == sorted(stay.tolist()) for stay in kept.values())


def test_equal_scores_keep_the_first_channels():
    chooser = selector("mlp")
    flat = {"0": torch.ones(16).double(), "2": torch.ones(12).double()}
    kept = chooser.choose(flat, Target("ratio", 0.5)).kept
    assert (kept["0"].tolist(), kept["2"].tolist()) == ([*range(8)], [*range(6)])


def test_target_out_of_reach_says_the_best_that_is_in_reach():
    model, inputs = grouped().eval(), (torch.zeros(1, 3, 8, 8),)
    chooser = Selector(model, analyse(model, inputs, protect=["2"]), inputs)
    # "2" keeps 8 channels in 2 groups; one channel of a group is left of "0", and one of "4"
    best = (3 * 2 + 8 * 1 + 8 * 1 + 1 * 4) / (3 * 8 + 8 * 4 + 8 * 16 + 16 * 4)
    with pytest.raises(PruningError, match=rf"{best:.3f} is left\. Left whole: .*protected by '2'"):
        chooser.choose(scores_of(chooser), Target("flops", 0.05))


def test_target_out_of_reach_of_a_free_model_names_the_options_in_the_way():
    chooser = selector("mlp", min_channels=16)
    chooser.coupling.frozen.clear()
    with pytest.raises(PruningError, match="lower min_channels"):
        chooser.choose(scores_of(chooser), Target("params", 0.5))


def test_dense_costs_are_torchs_count():
    model, inputs = make("residual")
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    chooser = Selector(model, analyse(model, inputs), inputs)
    assert chooser.dense_macs == counter.get_total_flops() / 2


# --- rankings and importance ------------------------------------------------------------------


def sizes(chooser, target, scores, **more):
    kept = chooser.choose(scores, target, **more).kept
    return {name: len(stay) for name, stay in kept.items()}


def test_locally_ranked_groups_lose_the_same_fraction_whatever_their_scores():
    chooser = selector("mlp", ranking="local")
    scores = {"0": torch.full((16,), 1e-9).double(), "2": torch.ones(12).double()}
    # 5 of 12 is the first fraction that leaves half of 368: 8 * 10 + 10 * 7 + 7 * 4 = 178
    assert sizes(chooser, Target("flops", 0.5), scores) == {"0": 10, "2": 7}
    assert sizes(chooser, Target("flops", 192 / 368), scores) == {"0": 10, "2": 8}  # 6 of 16


def test_isomorphic_groups_are_ranked_together_and_each_structure_loses_the_same_fraction():
    chooser = selector("functional_call", ranking="isomorphic")
    scores = {
        "a": torch.arange(8).double() + 1,  # with "b" a pool of 14: loses 7
        "b": torch.arange(6).double() + 4.5,
        "c": torch.full((16,), 1e-9).double(),  # alone: loses 8, though all score less
    }
    # ranked: a 1 2 3 4, b 4.5, a 5, b 5.5
    assert sizes(chooser, Target("ratio", 0.5), scores) == {"a": 3, "b": 4, "c": 8}


def test_isomorphic_ranking_searches_the_fraction_that_meets_the_target():
    chooser = selector("functional_call", ranking="isomorphic")
    flat = {g.name: torch.ones(g.channels).double() for g in chooser.coupling.groups}
    choice = chooser.choose(flat, Target("params", 0.5))
    gone = {g.name: 1 - len(choice.kept[g.name]) / g.channels for g in chooser.coupling.groups}
    pool = (8 * gone["a"] + 6 * gone["b"]) / 14
    assert choice.parameters <= 0.5 * chooser.dense_parameters
    assert abs(pool - gone["c"]) < 1 / 14  # in step, to a channel


@pytest.mark.parametrize("ranking", ["local", "isomorphic"])
@pytest.mark.parametrize("measure", ["flops", "params"])
def test_every_ranking_meets_the_target_with_rounded_groups(ranking, measure):
    chooser = selector("grouped", ranking=ranking, round_to=2, min_channels=2)
    choice = chooser.choose(scores_of(chooser), Target(measure, 0.6))
    dense, left = {
        "flops": (chooser.dense_macs, choice.macs),
        "params": (chooser.dense_parameters, choice.parameters),
    }[measure]
    assert 0.2 * dense < left <= 0.6 * dense
    assert all(len(stay) >= 2 and len(stay) % 2 == 0 for stay in choice.kept.values())


def test_importance_keeps_the_fewest_channels_that_carry_the_share():
    chooser = selector("mlp")
    scores = {
        "0": torch.tensor([0.0, 4, 8, 2, 1, 1] + [0] * 10).double(),  # 8 + 4 + 2 + 1 of 16
        "2": torch.ones(12).double(),  # 11 of 12 are the first above nine tenths
    }
    kept = chooser.choose(scores, Target("importance", 0.9)).kept
    assert kept["0"].tolist() == [1, 2, 3, 4]
    assert kept["2"].tolist() == [*range(11)]


def test_importance_that_is_met_exactly_needs_no_further_channel():
    chooser = selector("mlp")
    scores = {"0": torch.ones(16).double() / 3, "2": torch.ones(12).double() / 7}
    assert sizes(chooser, Target("importance", 0.75), scores) == {"0": 12, "2": 9}


def test_importance_rounds_and_keeps_the_fewest_channels():
    chooser = selector("mlp", round_to=4, min_channels=6)
    peaked = {n: torch.eye(size)[0].double() for n, size in (("0", 16), ("2", 12))}
    assert sizes(chooser, Target("importance", 0.9), peaked) == {"0": 8, "2": 8}


def test_importance_is_of_the_dense_group_when_some_of_it_is_gone():
    chooser = selector("mlp")
    flat = {"0": torch.ones(16).double(), "2": torch.ones(12).double()}
    first = chooser.choose(flat, Target("importance", 0.5), progress=0.5)  # 3 of 4 stay
    assert first.carried == {"0": 0.75, "2": 0.75}
    dead = {
        n: s.index_fill(0, torch.arange(len(first.kept[n]), len(s)), -1.0) for n, s in flat.items()
    }
    second = chooser.choose(dead, Target("importance", 0.5), carried=first.carried)
    assert {n: len(stay) for n, stay in second.kept.items()} == {"0": 8, "2": 6}


def test_misspelt_ranking_is_an_error_with_the_nearest_name():
    with pytest.raises(PruningError, match="no ranking is called 'globl'; did you mean 'global'"):
        selector(ranking="globl")
