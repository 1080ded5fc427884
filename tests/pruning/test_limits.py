"""How small groups may get, against sizes counted by hand."""

import math

import pytest
import torch
from models import PRUNABLE, make
from torch import nn

from slimkit.errors import PruningError
from slimkit.pruning.prune import analyse
from slimkit.pruning.selection import Selector
from slimkit.pruning.targets import Target


def selector(name="mlp", protect=(), **options):
    model, inputs = make(name)
    return Selector(model, analyse(model, inputs, protect), inputs, **options)


def flat(chooser):
    return {g.name: torch.ones(g.channels).double() for g in chooser.coupling.groups}


def sizes(chooser, target, scores=None, **more):
    target = None if target is None else Target(*target)
    kept = chooser.choose(scores or flat(chooser), target, **more).kept
    return {name: len(stay) for name, stay in kept.items()}


# --- max_ratio --------------------------------------------------------------------------------


def test_no_group_loses_more_than_max_ratio():
    scores = {"0": torch.full((16,), 1e-9).double(), "2": torch.ones(12).double()}
    chooser = selector(max_ratio=0.25)
    # 12 and 12 channels: 96 + 144 + 48 of 368 multiply-accumulates
    assert sizes(chooser, ("flops", 290 / 368), scores) == {"0": 12, "2": 12}
    assert sizes(chooser, ("flops", 287 / 368), scores) == {"0": 12, "2": 11}


def test_max_ratio_takes_away_to_the_channel():
    model = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 2))
    chooser = Selector(
        model, analyse(model, (torch.randn(1, 4),)), (torch.randn(1, 4),), max_ratio=0.7
    )
    assert sizes(chooser, ("importance", 0.01)) == {"0": 3}  # 10 * (1 - 0.7) is above 3 in floats


def test_two_max_ratios_are_those_of_the_first_and_the_last_group():
    chooser = selector("grouped", max_ratio=[0.25, 0.75])  # of 4, 4 and 16 channels
    assert sizes(chooser, ("ratio", 0.75)) == {"0": 3, "2": 2, "4": 4}


@pytest.mark.parametrize("ranking", ["global", "local", "isomorphic"])
@pytest.mark.parametrize("target", [("flops", 0.9), ("ratio", 0.5), ("importance", 0.2)], ids=str)
@pytest.mark.parametrize("name", PRUNABLE)
def test_max_ratio_holds_for_every_model_target_and_ranking(name, target, ranking):
    chooser = selector(name, ranking=ranking, max_ratio=0.5)
    scores = {g: s.cumsum(0) * (i + 1) for i, (g, s) in enumerate(flat(chooser).items())}
    left = sizes(chooser, target, scores)
    assert all(left[g.name] >= g.channels / 2 for g in chooser.coupling.groups)
    assert any(left[g.name] < g.channels for g in chooser.coupling.groups)


@pytest.mark.parametrize(
    "value", [1, -0.1, 1.5, math.nan, True, "0.5", [0.5], [0.1, 1.0], [0.1, 0.2, 0.3]], ids=str
)
def test_max_ratio_out_of_its_range_is_refused(value):
    with pytest.raises(PruningError, match="max_ratio must be a number from 0 to below 1, or two"):
        selector(max_ratio=value)


def test_ratio_above_every_max_ratio_is_out_of_reach():
    with pytest.raises(PruningError, match=r"max_ratio lets no group lose more than 0\.3"):
        sizes(selector(max_ratio=[0.1, 0.3]), ("ratio", 0.5))


@pytest.mark.parametrize("option", ["round_to", "min_channels"])
@pytest.mark.parametrize("value", [0, 1.5, True], ids=str)
def test_counts_that_are_no_whole_number_above_zero_are_refused(option, value):
    with pytest.raises(PruningError, match=f"{option} must be a whole number of at least 1"):
        selector(**{option: value})


# --- ratios -----------------------------------------------------------------------------------


def test_ratios_without_a_target_cut_their_groups_only():
    assert sizes(selector(ratios={"0": 0.25}), None) == {"0": 12, "2": 12}


def test_a_fraction_of_ratios_leaves_whole_channels_rounded_up():
    assert sizes(selector(ratios={"0": 0.3, "2": 0.3}), None) == {"0": 12, "2": 9}  # 11.2, 8.4


def test_the_first_pattern_that_covers_a_group_counts():
    chooser = selector(ratios={"2": 0.5, "*": 0.25})
    assert sizes(chooser, None) == {"0": 12, "2": 6}
    assert sizes(selector(ratios={"*": 0.25, "2": 0.5}), None) == {"0": 12, "2": 9}


@pytest.mark.parametrize("pattern", ["stem", "more", "bn2", "st*"])
def test_ratios_name_any_layer_that_makes_the_channels(pattern):
    assert sizes(selector("residual", ratios={pattern: 0.5}), None) == {"stem": 4, "down": 6}


def test_the_name_of_a_block_covers_the_layers_inside():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 12), nn.ReLU()), nn.Linear(12, 4))
    inputs = (torch.randn(1, 8),)
    chooser = Selector(model, analyse(model, inputs), inputs, ratios={"0": 0.5})
    assert sizes(chooser, None) == {"0.0": 6}


def test_the_target_decides_about_the_groups_that_ratios_do_not_name():
    chooser = selector(ratios={"0": 0.0})
    # 16 channels stay in "0": 128 + 16 b + 4 b of 368 multiply-accumulates
    assert sizes(chooser, ("flops", 0.5)) == {"0": 16, "2": 2}


def test_max_ratio_does_not_hold_ratios_back():
    assert sizes(selector(max_ratio=0.1, ratios={"0": 0.75}), None) == {"0": 4, "2": 12}


def test_ratios_round_and_keep_the_fewest_channels():
    assert sizes(selector(round_to=8, ratios={"0": 0.25}), None)["0"] == 16  # of 12
    assert sizes(selector(min_channels=5, ratios={"0": 0.75}), None)["0"] == 5


def test_ratios_grow_along_the_way():
    chooser = selector(ratios={"0": 0.5})
    assert [sizes(chooser, None, progress=p)["0"] for p in (0.25, 0.5, 1)] == [14, 12, 8]


@pytest.mark.parametrize("value", [1, -0.1, math.nan, True, "0.5", None], ids=str)
def test_a_ratio_out_of_its_range_is_refused(value):
    with pytest.raises(PruningError, match="ratios: '0' must lose a fraction from 0 to below 1"):
        selector(ratios={"0": value})


def test_ratios_that_are_no_mapping_are_refused():
    with pytest.raises(PruningError, match="ratios must be such as"):
        selector(ratios=[("0", 0.5)])


def test_a_pattern_that_names_no_layer_is_refused_with_the_nearest():
    with pytest.raises(PruningError, match=r"ratios: no layer .* called 'stern'.*'stem'"):
        selector("residual", ratios={"stern": 0.5})


@pytest.mark.parametrize(
    ("pattern", "protect", "reason"),
    [
        ("4", (), r"4: its channels are the model's output"),
        ("2", ("2",), r"2: protected by '2'"),
        ("1", (), "no channels that '1' makes may go$"),
    ],
)
def test_a_pattern_of_layers_that_stay_whole_is_refused_with_the_reason(pattern, protect, reason):
    with pytest.raises(PruningError, match=reason):
        selector(protect=protect, ratios={pattern: 0.5})


# --- out of reach -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "best", "said"),
    [
        ({"max_ratio": 0.5}, 8 * 8 + 8 * 6 + 6 * 4, r"raise max_ratio \(0\.5\)$"),
        ({"max_ratio": [0.5, 0]}, 8 * 8 + 8 * 12 + 12 * 4, r"2: held by max_ratio \(\[0\.5, 0\]\)"),
        ({"round_to": 12}, 8 * 12 + 12 * 12 + 12 * 4, r"2: held by round_to \(12\)"),
        ({"min_channels": 9}, 8 * 9 + 9 * 9 + 9 * 4, r"or lower min_channels \(9\)$"),
        ({"ratios": {"2": 0}}, 8 * 1 + 1 * 12 + 12 * 4, r"or change ratios \(of 2\)$"),
    ],
    ids=str,
)
def test_target_out_of_reach_says_the_best_and_the_options_in_the_way(options, best, said):
    with pytest.raises(PruningError, match=rf"{best / 368:.3f} is left\. Left whole: 4.*{said}"):
        sizes(selector(**options), ("flops", 0.02))


def test_options_that_are_not_in_the_way_are_not_named():
    with pytest.raises(PruningError) as caught:
        sizes(selector(min_channels=9, max_ratio=0.9), ("flops", 0.02))
    assert "max_ratio" not in str(caught.value)
    assert "round_to" not in str(caught.value)


def mib(a, b):
    """Size of the mlp with `a` and `b` hidden channels, in float32."""
    return 4 * (8 * a + a + a * b + b + 4 * b + 4) / 2**20


def test_size_out_of_reach_says_the_smallest_in_mib():
    said = f"{mib(1, 1):.4g} of {mib(16, 12):.4g} MiB is left"
    with pytest.raises(PruningError, match=said):
        sizes(selector(), ("size_mb", 1e-6))


@pytest.mark.parametrize("factor", [1, 3])
def test_size_that_is_not_below_the_dense_says_the_dense_and_the_smallest(factor):
    said = f"the model has {mib(16, 12):.4g} MiB; the smallest that can be reached is "
    with pytest.raises(PruningError, match=f"{said}{mib(1, 1):.4g}"):
        sizes(selector(), ("size_mb", mib(16, 12) * factor))


def test_size_is_met_and_one_channel_more_would_miss_it():
    limit = mib(16, 12) / 2
    left = sizes(selector(), ("size_mb", limit))
    assert mib(*left.values()) <= limit
    assert mib(left["0"] + 1, left["2"]) > limit
    assert mib(left["0"], left["2"] + 1) > limit
