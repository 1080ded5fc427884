"""The scan measures what a naive one does, with less work, and goes on where it was."""

import copy
import math

import pytest
import torch
from models import make, residual
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimkit.errors import PruningError
from slimkit.pruning import sensitivity
from slimkit.pruning.coupling import Coupling
from slimkit.pruning.prune import analyse
from slimkit.pruning.scores import group_scores
from slimkit.pruning.sensitivity import (
    RATIOS,
    Curve,
    Divergence,
    LossIncrease,
    Point,
    Sums,
    fewer,
    removed_at,
    scan,
)
from slimkit.registry import discover


def prepared(name="residual", samples=40, size=8):
    """Model, coupling, order of each group's channels, labelled batches."""
    model, inputs = make(name)
    coupling = analyse(model, inputs)
    scores = group_scores(model, coupling, discover().create("criterion", "l1"))
    orders = {n: s.argsort(descending=True) for n, s in scores.items()}
    x = torch.randn(samples, *inputs[0].shape[1:])
    labels = torch.arange(samples) % model(inputs[0]).shape[-1]
    batches = list(zip(x.split(size), labels.split(size), strict=True))
    return model, coupling, orders, batches


def cross_entropy(model):
    return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model, batches):
    losses = torch.cat([cross_entropy(model)(batch) for batch in batches])
    return losses.double().mean().item()


def naive(model, coupling, orders, batches, ratio):
    """Group -> mean loss over all batches with the channels zeroed by hand, less the dense one."""
    found = {}
    with torch.no_grad():
        for group in coupling.groups:
            small = copy.deepcopy(model)
            count = math.floor(group.channels * ratio + 1e-9)
            gone = orders[group.name][group.channels - count :].tolist()
            parameters = dict(small.named_parameters())
            for member in group.members:
                for i, channel in enumerate(member.channel.tolist()):
                    if channel in gone and member.tensor in parameters:
                        parameters[member.tensor].select(member.dim, i).zero_()
            found[group.name] = mean_loss(small, batches) - mean_loss(model, batches)
    return found


@pytest.mark.parametrize(
    "name", ["residual", "chain", "concatenation", "depthwise", "squeeze_excite", "mlp", "shared"]
)
def test_on_all_data_every_point_is_the_naive_scans(name):
    model, coupling, orders, batches = prepared(name)
    curves = scan(model, coupling, orders, batches, LossIncrease(cross_entropy(model)), precision=0)
    assert [c.group for c in curves] == [g.name for g in coupling.groups]
    for i, ratio in enumerate(RATIOS):
        wanted = naive(model, coupling, orders, batches, ratio)
        found = {curve.group: curve.points[i].increase for curve in curves}
        assert found == pytest.approx(wanted, abs=2e-6)
    assert {p.error for c in curves for p in c.points} == {0.0}


def test_a_residual_stage_is_one_row_and_its_channels_matter():
    model, coupling, orders, batches = prepared()
    curves = scan(model, coupling, orders, batches, Divergence(model), precision=0)
    stage = {curve.group: curve for curve in curves}
    assert set(stage) == {"stem", "down"}
    assert {"stem", "up", "more", "head"} <= set(stage["stem"].layers)
    assert stage["stem"].points[-1].increase > 0.05


def test_the_models_weights_come_back_and_its_flags():
    model, coupling, orders, batches = prepared()
    before = copy.deepcopy(model.state_dict())
    model.train()
    scan(model, coupling, orders, batches, LossIncrease(cross_entropy(model)))
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_points_that_are_clear_use_few_samples_and_stay_near(monkeypatch):
    monkeypatch.setattr(sensitivity, "FEWEST", 32)
    model, coupling, orders, batches = prepared("residual", samples=800, size=16)
    measure = Divergence(model)
    few = scan(model, coupling, orders, batches, measure, precision=0.1)
    all_ = scan(model, coupling, orders, batches, measure, precision=0)
    points = [
        pair
        for a, b in zip(few, all_, strict=True)
        for pair in zip(a.points, b.points, strict=True)
    ]
    points = [(a, b) for a, b in points if a.removed]
    assert max(a.samples for a, _ in points) < 400
    assert {b.samples for _, b in points} == {800}
    for a, b in points:
        assert a.error > 0
        assert abs(a.increase - b.increase) < 4.5 * a.error


def test_the_layers_in_front_of_a_group_are_computed_once_a_batch():
    model, coupling, orders, batches = prepared("chain")
    later = Coupling(tuple(g for g in coupling.groups if g.name == "3"), {})
    ratios = len({removed_at(later.groups[0], r) for r in RATIOS} - {0})
    with FlopCounterMode(display=False) as counter:
        scan(model, later, orders, batches, Divergence(model), precision=0)
    first, second, linear = (model[i].weight.numel() for i in (0, 3, 7))
    whole, behind = 64 * (first + second) + linear, 64 * second + linear
    macs = counter.get_total_flops() / 2
    planning = 5 * 2 * whole  # on two samples
    wanted = 40 * (whole + ratios * behind)
    assert wanted <= macs <= wanted + planning


class Killed(Exception):
    pass


def test_a_scan_that_was_killed_goes_on_and_ends_with_the_same_numbers():
    model, coupling, orders, batches = prepared()
    measure, kept = LossIncrease(cross_entropy(model)), {}

    def keep(number, group, sums):
        kept[number, group] = sums
        if len(kept) == 4:
            raise Killed

    with pytest.raises(Killed):
        scan(model, coupling, orders, batches, measure, precision=0, done=keep)
    again = []
    curves = scan(
        model,
        coupling,
        orders,
        batches,
        measure,
        precision=0,
        known=kept,
        done=lambda *one: again.append(one[:2]),
    )
    assert len(again) == len(batches) * len(coupling.groups) - 4
    assert not set(again) & set(kept)
    assert curves == scan(model, coupling, orders, batches, measure, precision=0)


def test_a_finished_scan_calls_the_model_no_more():
    model, coupling, orders, batches = prepared()
    measure, kept = LossIncrease(cross_entropy(model)), {}
    first = scan(
        model, coupling, orders, batches, measure, done=lambda n, g, s: kept.update({(n, g): s})
    )

    def broken(_batch):
        raise AssertionError("called")

    assert first == scan(model, coupling, orders, batches, LossIncrease(broken), known=kept)


def test_a_loss_known_per_batch_counts_each_batch_by_its_samples():
    model, coupling, orders, batches = prepared(samples=36, size=8)  # the last one has 4
    each = cross_entropy(model)
    of_samples = scan(model, coupling, orders, batches, LossIncrease(each), precision=0)
    of_batches = scan(
        model, coupling, orders, batches, LossIncrease(lambda b: each(b).mean()), precision=0
    )
    for a, b in zip(of_samples, of_batches, strict=True):
        assert [p.increase for p in b.points] == pytest.approx(
            [p.increase for p in a.points], abs=1e-6
        )
        assert {p.samples for p in b.points if p.removed} == {36}


def test_standard_error_is_that_of_the_mean_of_a_sample_without_replacement():
    values = torch.tensor([1.0, 4.0, 2.0, 7.0, 3.0, 1.0])
    sums = Sums.of(values[:4], 4)
    sums.add(Sums.of(values[4:], 2))
    assert sums.mean == pytest.approx(3.0)
    plain = values.double().std().item() / math.sqrt(6)
    assert sums.error(8) == pytest.approx(plain * math.sqrt(1 - 2 / 8))
    assert sums.error(2) == 0


def test_divergence_is_zero_for_the_same_and_one_for_nothing():
    measure = Divergence(nn.Identity())
    dense = measure.values(torch.randn(5, 3, 2))
    assert measure.increase(dense, dense).tolist() == [0] * 5
    nothing = [torch.zeros_like(t) for t in dense]
    assert measure.increase(dense, nothing).tolist() == pytest.approx([1] * 5)


def points(*increases, step=2):
    return tuple(
        Point(0.1 * i, i * step, value, 0.0, 8) for i, value in enumerate(increases, start=1)
    )


def test_a_curve_is_monotone_starts_at_zero_and_goes_on_behind_its_end():
    curve = Curve("a", (), 16, points(0.2, 0.1, 1.2))
    wanted = {0: 0, 1: 0.1, 2: 0.2, 3: 0.2, 4: 0.2, 5: 0.7, 6: 1.2, 8: 2.2}
    assert {n: curve.increase_at(n) for n in wanted} == pytest.approx(wanted)
    assert Curve("a", (), 16, points(-0.3, 0.5)).increase_at(2) == 0


def test_small_groups_keep_a_channel_and_lose_whole_ones():
    group = type("Group", (), {"channels": 4})()
    assert [removed_at(group, r) for r in RATIOS] == [0, 0, 1, 1, 2, 2, 2]
    group.channels = 1
    assert removed_at(group, 0.99) == 0


def test_few_samples_of_a_batch_with_lists_and_dicts():
    batch = {"image": torch.zeros(6, 3), "boxes": [1, 2, 3, 4, 5, 6], "name": "a"}
    few = fewer((batch, torch.arange(6)), 6)
    assert few[0]["image"].shape == (2, 3)
    assert few[0]["boxes"] == [1, 2]
    assert few[1].tolist() == [0, 1]


def test_without_a_batch_it_says_so():
    model, coupling, orders, _ = prepared()
    with pytest.raises(PruningError, match="validation data is empty"):
        scan(model, coupling, orders, [], Divergence(model))


def test_a_dense_model_that_does_not_work_is_refused():
    model, coupling, orders, batches = prepared()
    bad = LossIncrease(lambda batch: cross_entropy(model)(batch) * math.nan)
    with pytest.raises(PruningError, match="dense model's validation loss"):
        scan(model, coupling, orders, batches, bad)


def test_a_network_whose_calls_depend_on_the_weights_is_computed_whole():
    model = residual().eval()
    flow = model.flow

    def jumpy(net, x):
        out = flow(net, x)
        return out * float(net.down.weight.abs().sum())  # a number that no operation carries

    model.flow = jumpy
    x = torch.randn(16, 3, 8, 8)
    coupling = analyse(residual().eval(), (x[:1],))
    orders = {g.name: torch.arange(g.channels) for g in coupling.groups}
    batches = [(x[:8], torch.zeros(8, dtype=torch.long)), (x[8:], torch.ones(8, dtype=torch.long))]
    curves = scan(model, coupling, orders, batches, LossIncrease(cross_entropy(model)), precision=0)
    wanted = naive(model, coupling, orders, batches, 0.5)
    assert {c.group: c.points[4].increase for c in curves} == pytest.approx(wanted, abs=1e-5)
