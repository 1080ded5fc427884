"""Channels are rounded to what a runtime computes fastest, where that leaves something to prune."""

import pytest
import torch
from torch import nn

import slimkit
from slimkit.interfaces import Backend
from slimkit.pruning.prune import analyse, channel_multiple, prune
from slimkit.pruning.selection import Selector
from slimkit.pruning.targets import Target
from slimkit.registry import discover

ROWS = torch.randn(1, 4)


def widths(*sizes):
    """Linear layers of these widths."""
    sizes = [4, *sizes, 2]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))).eval()


def selector(model, **options):
    return Selector(model, analyse(model, (ROWS,)), (ROWS,), **options)


def ranked(chooser):
    """The first channels matter most."""
    return {
        g.name: torch.arange(g.channels, 0, -1).double() / g.channels
        for g in chooser.coupling.groups
    }


def sizes(chooser, measure, value):
    kept = chooser.choose(ranked(chooser), Target(measure, value)).kept
    return [len(kept[group.name]) for group in chooser.coupling.groups]


@pytest.mark.parametrize("measure", ["flops", "params"])
def test_large_groups_are_multiples_and_small_ones_of_half_or_a_quarter(measure):
    chooser = selector(widths(64, 12, 6, 3), multiple=8)
    for value in (0.3, 0.5, 0.8):
        found = sizes(chooser, measure, value)
        assert [size % step for size, step in zip(found, (8, 4, 2, 1), strict=True)] == [0] * 4


def test_what_a_user_says_is_kept_to_the_letter():
    assert sizes(selector(widths(64, 12), multiple=8, round_to=1), "ratio", 0.3) == [45, 9]
    assert sizes(selector(widths(64, 12), multiple=8, round_to=6), "ratio", 0.3) == [48, 12]


def test_a_ratio_does_not_become_nothing():
    assert sizes(selector(widths(64, 12), multiple=8), "ratio", 0.3) == [48, 10]  # of 45 and 9


def test_no_more_goes_than_the_target_asks():
    """A whole multiple at once may overshoot; what fits is given back, the best first."""
    model = widths(64, 64, 64)
    chooser = selector(model, multiple=16)
    scores = ranked(chooser)
    limit = 0.6 * chooser.dense_macs
    choice = chooser.choose(scores, Target("flops", 0.6))
    assert choice.macs <= limit
    for group in chooser.coupling.groups:
        kept = dict(choice.kept)
        if len(kept[group.name]) < 64:
            kept[group.name] = torch.arange(len(kept[group.name]) + 16)
            assert chooser.cost.predict(chooser.counting.removed(kept))[0] > limit


def test_channels_that_died_earlier_are_not_given_back():
    chooser = selector(widths(64, 64), multiple=16)
    scores = ranked(chooser)
    scores["0"][20:] = -1.0  # dead
    kept = chooser.choose(scores, Target("flops", 0.9)).kept["0"]
    assert kept.tolist() == [*range(20)]


@pytest.mark.parametrize("name", ["onnxruntime", "ncnn"])
def test_a_backend_rounds_what_is_pruned_for_it(name):
    small = prune(widths(64, 48), ROWS, target={"flops": 0.5}, backend=name)
    sizes = [kept for _, kept, _ in small.slimkit_pruning.groups.values()]
    assert min(sizes) < 48
    assert not any(size % 8 for size in sizes)


def test_several_runtimes_get_their_least_common_multiple(monkeypatch):
    class Sixes(Backend):
        channel_multiple = 6

    create = type(discover()).create
    monkeypatch.setattr(
        type(discover()),
        "create",
        lambda self, kind, name, *rest: Sixes if name == "six" else create(self, kind, name, *rest),
    )
    assert channel_multiple([]) == 1
    assert channel_multiple(["six", "ncnn"]) == 24


def test_an_unknown_backend_is_an_error():
    with pytest.raises(slimkit.errors.SlimkitError, match="no backend is called 'ncn'"):
        prune(widths(8), ROWS, target={"flops": 0.5}, backend="ncn")
