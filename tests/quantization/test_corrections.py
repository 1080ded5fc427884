"""Corrections: each against its definition, and that only what helps is kept."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import models
import pytest
import torch
from models import Net, conv
from nets import INPUTS, TENSORS, conv_norm, lively, normal, residual_net, simulated
from torch import Tensor, nn
from torch.nn import functional

import slimkit
from slimkit.builtin.quantizers.minmax import MinMax
from slimkit.calls import trace
from slimkit.copies import copied
from slimkit.errors import QuantizationError
from slimkit.interfaces import Grid
from slimkit.quantization.calibration import calibrate_, maker
from slimkit.quantization.corrections.apply import NAMES, apply_
from slimkit.quantization.corrections.batchnorm import batchnorm_
from slimkit.quantization.corrections.bias import bias_
from slimkit.quantization.corrections.equalize import equalize_
from slimkit.quantization.corrections.moments import moments
from slimkit.quantization.corrections.pairs import pairs_of
from slimkit.quantization.corrections.places import places
from slimkit.quantization.corrections.rounding import rounding_, settle
from slimkit.quantization.fake import FakeQuantization, Fixed
from slimkit.quantization.finished import finish

IMAGES = normal(16, 3, 8, 8, seed=3)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def recalibration(small, data):
    fake = small.fake

    def recalibrate() -> None:
        parameters = dict(small.model.named_parameters(remove_duplicate=False))
        minmax = maker("minmax")
        fresh = FakeQuantization(fake.sites, fake.scheme, minmax, minmax, parameters)
        for name in fake.sites.activations:
            fake.quantizers[name.replace(".", "/")] = fresh[name]
        calibrate_(fake, small.model, data, len(data))

    return recalibrate


def uneven(factor: float = 50.0) -> nn.Module:
    """A network whose first channels differ in size, which rounds badly."""
    net = lively(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4)))
    sizes = torch.logspace(0, 1, 8, base=factor).view(-1, 1, 1, 1)
    net[0].weight.data *= sizes
    net[0].bias.data *= sizes.flatten()
    net[2].weight.data /= sizes.view(1, -1, 1, 1)
    return net


# equalize


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (models.chain, IMAGES),
        (models.mlp, normal(16, 8)),
        (models.depthwise, IMAGES),
        (models.grouped, IMAGES),
        (models.residual, IMAGES),
        (models.concatenation, IMAGES),
        (models.squeeze_excite, IMAGES),
        (models.transposed, IMAGES),
        (models.conv1d, normal(16, 3, 10)),
        (models.functional_call, IMAGES),
        (conv_norm, IMAGES),
    ],
)
@pytest.mark.parametrize("scheme", [INPUTS, TENSORS], ids=["inputs", "tensors"])
def test_equalized_network_computes_the_same_in_float(build, x, scheme) -> None:
    net = lively(build()).eval()
    small = simulated(net, [x], scheme)
    equalize_(small.model, small.fake, (x,))
    expected = net(x).detach()
    torch.testing.assert_close(
        small.model(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize(
    ("build", "x", "fronts"),
    [
        (models.depthwise, IMAGES, ["0", "3", "5"]),
        (models.grouped, IMAGES, ["0", "2", "4"]),
        (models.mlp, normal(16, 8), ["0", "2"]),
        (models.chain, IMAGES, ["0", "3"]),
        (models.residual, IMAGES, ["down"]),
        (models.transposed, IMAGES, []),
        (models.sigmoid_chain, normal(16, 8), []),
    ],
)
def test_pairs_are_layers_with_homogeneous_functions_between(build, x, fronts) -> None:
    traced = trace(build().eval(), (x,))
    found, skipped = pairs_of(traced, places(traced))
    assert [pair.front.layer for pair in found] == fronts
    assert all(skipped.values())


def test_both_branches_of_a_concatenation_are_scaled() -> None:
    def flow(net: Net, x: Tensor) -> Tensor:
        x = torch.cat([functional.relu(net.a(x)), functional.relu(net.b(x))], 1)
        return net.head(functional.max_pool2d(x, 2).flatten(1))

    net = lively(Net(flow, a=conv(3, 4), b=conv(3, 6), head=nn.Linear(160, 3))).eval()
    net.b.weight.data[2] *= 30
    small = simulated(net, [IMAGES], TENSORS)
    skipped = equalize_(small.model, small.fake, (IMAGES,))
    assert "b" not in skipped
    assert not torch.equal(small.model.b.weight, net.b.weight)
    torch.testing.assert_close(small.model(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_clipping_function_and_a_shared_layer_are_refused_with_a_reason() -> None:
    clipped = nn.Sequential(conv(3, 4), nn.ReLU6(), conv(4, 4))
    small = simulated(clipped, [IMAGES])
    assert "hardtanh" in equalize_(small.model, small.fake, (IMAGES,))["0"]

    def flow(net: Net, x: Tensor) -> Tensor:
        return net.b(functional.relu(net.a(functional.relu(net.a(x)))))

    small = simulated(Net(flow, a=conv(3, 3), b=conv(3, 4)), [IMAGES])
    assert "several calls" in equalize_(small.model, small.fake, (IMAGES,))["a"]


@pytest.mark.parametrize("scheme", [INPUTS, TENSORS], ids=["inputs", "tensors"])
def test_equalizing_uneven_channels_raises_the_signal_to_noise(scheme) -> None:
    data = [IMAGES[:8], IMAGES[8:]]
    small = simulated(uneven(), data, scheme)
    (one,) = apply_(
        small.model, small.fake, [(x,) for x in data], "equalize", recalibration(small, data)
    )
    assert one.kept
    assert one.after_db > one.before_db + 3
    assert set(one.layers) == {"0", "2", "4"}


# bias


def means(model: nn.Module, name: str, x: Tensor, run) -> Tensor:
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: found.append(out))
    run(x)
    handle.remove()
    return found[0].movedim(1, 0).flatten(1).mean(1)


@pytest.mark.parametrize(
    ("layers", "end"),
    [
        ([conv(3, 6)], "0"),
        ([conv(3, 6, bias=False), nn.BatchNorm2d(6)], "1"),
        ([conv(3, 6), nn.BatchNorm2d(6, affine=False)], "1"),
        ([nn.ConvTranspose2d(3, 6, 2, stride=2)], "0"),
        ([nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6)], "2"),
    ],
    ids=["bias", "beta", "mean", "transposed", "linear"],
)
def test_corrected_channels_have_the_means_of_the_float_network(layers, end) -> None:
    torch.manual_seed(0)
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()  # of this seed, not of what was imported before
    net = nn.Sequential(*layers)
    net.train()(3 * IMAGES + 1)
    net.eval()
    scheme = INPUTS.narrowed(3)
    if isinstance(layers[0], nn.ConvTranspose2d):
        scheme = replace(scheme, operations=frozenset({"conv_transpose2d"}))
    small = simulated(net, [IMAGES], scheme).eval()
    wanted = means(net, end, IMAGES, net)
    assert (means(small.model, end, IMAGES, small) - wanted).abs().max() > 3e-4
    assert bias_(small.model, net, small.fake, (IMAGES,)) == {}
    torch.testing.assert_close(means(small.model, end, IMAGES, small), wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_behind_is_corrected_on_what_the_corrected_one_gives() -> None:
    net = lively(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4))).eval()
    small = simulated(net, [IMAGES], INPUTS.narrowed(3)).eval()
    bias_(small.model, net, small.fake, (IMAGES,))
    for end in ("0", "2"):
        wanted = means(net, end, IMAGES, net)
        torch.testing.assert_close(
            means(small.model, end, IMAGES, small), wanted, rtol=1e-4, atol=1e-5
        )


def test_a_layer_with_nothing_to_shift_is_named() -> None:
    net = nn.Sequential(conv(3, 4, bias=False), nn.ReLU(), conv(4, 4))
    small = simulated(net, [IMAGES])
    assert bias_(small.model, net, small.fake, (IMAGES,)) == {
        "0": "it has neither bias nor batch-norm"
    }


# rounding


class Typical(MinMax):
    """Covers three times the mean absolute value, which rounding changes."""

    def observe(self, x: Tensor) -> None:
        self.hi.copy_(3 * self.grid.rows(x.detach()).abs().mean(1))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (conv(4, 6, stride=2), (5, 4, 9, 7)),
        (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(2, 1), groups=2), (5, 4, 9, 7)),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4, bias=False), (5, 4, 6, 6)),
        (nn.Conv1d(4, 6, 3, padding=1, stride=2), (5, 4, 9)),
        (nn.Linear(4, 6), (5, 3, 4)),
    ],
)
def test_moments_give_the_distance_of_the_outputs(layer: nn.Module, shape) -> None:
    x, seed = normal(*shape), torch.Generator()
    op = next(call.op for call in trace(layer, (x,)).calls if call.state)
    with torch.no_grad():
        target = layer(x) + normal(*layer(x).shape, seed=1)
        arguments = {"input": x, "weight": layer.weight, "bias": layer.bias}
        if op != "linear":
            names = ("stride", "padding", "dilation", "groups")
            arguments |= {name: getattr(layer, name) for name in names}
        second, cross = moments(op, arguments, target, seed)
        rows = layer.weight.reshape(cross.shape)
        changed = rows + normal(*rows.shape, seed=2)
        found = [((w @ second - 2 * cross) * w).sum() for w in (rows, changed)]
        before = (layer(x) - target).square().sum()
        layer.weight.copy_(changed.reshape(layer.weight.shape))
        after = (layer(x) - target).square().sum()
    positions = target.numel() / 6 if len(layer.weight) == 6 else target.numel() / 4
    torch.testing.assert_close(
        found[1] - found[0], (after - before) / positions, rtol=1e-4, atol=1e-4
    )


def distance_by(exact: Tensor, step: Tensor, second: Tensor, steps: Tensor) -> float:
    off = (steps - exact) * step
    return float(((off @ second) * off).sum())


def test_settled_integers_are_neighbours_that_no_single_turn_improves() -> None:
    width, gaps = 8, []
    for seed in range(12):
        x = normal(200, width, seed=seed) @ normal(width, width, seed=seed + 50)
        exact, step = 3 * normal(1, 1, width, seed=seed + 100), torch.full((1, 1, width), 0.1)
        second = (x.T @ x / len(x))[None]
        limit = torch.full_like(exact, 100)
        damped = second + 0.01 * second[0].diagonal().mean() * torch.eye(width)

        distance = partial(distance_by, exact, step, damped)
        found = settle(exact, step, second, (exact * step) @ second, -limit, limit)
        assert torch.all((found == exact.floor()) | (found == exact.ceil()))
        up = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * width)
        best = min(distance(exact.floor() + choice) for choice in up)
        for n in range(width):
            turned = found.clone()
            turned[..., n] = exact.floor()[..., n] + exact.ceil()[..., n] - found[..., n]
            assert distance(turned) >= distance(found) - 1e-6
        nearest = distance(exact.round())
        gaps.append((distance(found) - best) / max(nearest - best, 1e-6))
    assert max(gaps) <= 1
    assert sum(gaps) / len(gaps) < 0.4


@pytest.mark.parametrize("weights", ["minmax", "percentile"])
@pytest.mark.parametrize("scheme", [INPUTS, TENSORS], ids=["inputs", "tensors"])
def test_chosen_integers_are_those_of_the_finished_model(scheme, weights) -> None:
    scheme = scheme.narrowed(4)
    net = residual_net().eval()
    small = simulated(net, [IMAGES], scheme, weights=weights).eval()
    before = {n: small.fake[n].qparams()[0].clone() for n, _ in small.fake.sites.weights.values()}
    for name, path in small.fake.sites.weights.values():
        small.fake.fit_weight_(name, small.model.get_parameter(path))
        before[name] = small.fake[name].qparams()[0].clone()
    assert rounding_(small.model, net, small.fake, (IMAGES,)) == {}
    changed = 0
    for name, path in small.fake.sites.weights.values():
        weight, grid = small.model.get_parameter(path).detach(), small.fake[name].grid
        steps = net.get_parameter(path).detach() / grid.spread(before[name], weight)
        steps = steps.clamp(grid.qmin, grid.qmax)
        integers = weight / grid.spread(before[name], weight)
        torch.testing.assert_close(integers, integers.round(), atol=1e-3, rtol=0)
        assert (integers - steps).abs().max() < 1.001
        changed += int((integers.round() != steps.round()).sum())
        torch.testing.assert_close(small.fake.weight(name, weight), weight, rtol=1e-5, atol=1e-7)
    assert changed > 10
    program = finish(small, (IMAGES[:1],)).program.module()
    torch.testing.assert_close(program(IMAGES[:1]), small(IMAGES[:1]), rtol=1e-3, atol=1e-3)


def test_a_range_that_would_move_is_fixed() -> None:
    net = lively(nn.Sequential(conv(3, 4))).eval()
    parameters = dict(net.named_parameters())
    kinds = {}
    for quantizer in (MinMax, Typical):
        fake = FakeQuantization.of(net, (IMAGES,), INPUTS.narrowed(4), quantizer, maker("minmax"))
        calibrate_(fake, net, [IMAGES], 1)
        before, _ = fake.ranges(parameters)["0/weight:weight"]
        own = copied(net)
        rounding_(own, net, fake, (IMAGES,))
        after, _ = fake.ranges(dict(own.named_parameters()))["0/weight:weight"]
        torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
        kinds[quantizer] = type(fake["0/weight:weight"])
    assert kinds == {MinMax: MinMax, Typical: Fixed}


def test_rounding_brings_outputs_closer_on_other_data() -> None:
    net, other = residual_net().eval(), normal(32, 3, 8, 8, seed=9)
    small = simulated(net, [IMAGES], INPUTS.narrowed(4)).eval()
    before = (small(other) - net(other)).square().mean()
    rounding_(small.model, net, small.fake, (IMAGES,))
    assert (small(other) - net(other)).square().mean() < 0.7 * before


def test_what_pruning_has_zeroed_stays_zero() -> None:
    net = slimkit.prune(residual_net(), IMAGES[:1], granularity="2:4", protect=["up"]).eval()
    small = simulated(net, [IMAGES], INPUTS.narrowed(4)).eval()
    rounding_(small.model, net, small.fake, (IMAGES,))
    for name in net.slimkit_pruning.weights:
        before, after = net.get_parameter(name), small.model.get_parameter(name)
        assert not torch.equal(before, after)
        assert not after[before == 0].any()


# batchnorm


def test_statistics_move_by_what_rounding_changes_and_not_by_the_data() -> None:
    net = lively(nn.Sequential(conv(3, 6, bias=False), nn.BatchNorm2d(6))).eval()
    small = simulated(net, [IMAGES], INPUTS.narrowed(3)).eval()
    with torch.no_grad():
        exact = net[0](IMAGES)
        with small.fake.active(small.model):
            weight = small.fake.weight("0/weight:weight", net[0].weight)
        rounded = functional.conv2d(small.fake["0:conv2d:0:in0"](IMAGES), weight, padding=1)
    batchnorm_(small.model, net, small.fake, [(IMAGES,)])
    of = (0, 2, 3)
    torch.testing.assert_close(
        small.model[1].running_mean, net[1].running_mean + rounded.mean(of) - exact.mean(of)
    )
    torch.testing.assert_close(
        small.model[1].running_var, net[1].running_var * rounded.var(of) / exact.var(of)
    )


# apply_


def test_auto_keeps_what_gains_and_puts_the_rest_back_to_the_last_bit(monkeypatch) -> None:
    data = [(x,) for x in IMAGES.split(4)]
    small = simulated(residual_net(), [x for (x,) in data], INPUTS.narrowed(4))
    monkeypatch.setattr("slimkit.quantization.corrections.apply.MARGIN_DB", 1000.0)
    before, ranges = state(small.model), state(small.fake)
    found = apply_(small.model, small.fake, data, "auto", recalibration(small, IMAGES.split(4)))
    assert [one.name for one in found] == list(NAMES)
    assert not any(one.kept for one in found)
    after = state(small.model)
    assert all(torch.equal(before[k], after[k]) for k in before)
    after = state(small.fake)
    assert all(torch.equal(ranges[k], after[k]) for k in ranges if "weight" not in k)


def test_auto_ends_no_lower_than_it_began() -> None:
    data = [(x,) for x in IMAGES.split(4)]
    small = simulated(residual_net(), [x for (x,) in data], INPUTS.narrowed(4))
    found = apply_(small.model, small.fake, data, "auto", recalibration(small, IMAGES.split(4)))
    kept = [one for one in found if one.kept]
    assert "rounding" in [one.name for one in kept]
    for one, behind in itertools.pairwise(found):
        assert behind.before_db == (one.after_db if one.kept else one.before_db)
    assert all(one.after_db >= one.before_db + 0.25 for one in kept)


def test_named_corrections_are_applied_in_their_order_and_kept() -> None:
    data = [(IMAGES,)]
    small = simulated(residual_net(), [IMAGES], INPUTS.narrowed(4))
    found = apply_(small.model, small.fake, data, ["bias", "rounding", "batchnorm"])
    assert [one.name for one in found] == ["rounding", "batchnorm", "bias"]
    assert all(one.kept for one in found)


def test_layers_in_float_keep_their_weights() -> None:
    net = residual_net()
    small = simulated(net, [IMAGES], INPUTS.narrowed(4), keep_float=["down"])
    found = apply_(small.model, small.fake, [(IMAGES,)], ["rounding", "bias"])
    assert torch.equal(small.model.down.weight, net.down.weight)
    assert "down" not in found[0].layers


def test_the_layers_of_a_corrected_model_keep_their_names_and_shapes() -> None:
    net = residual_net()
    small = simulated(net, [IMAGES], TENSORS)
    apply_(small.model, small.fake, [(IMAGES,)], NAMES, recalibration(small, [IMAGES]))
    assert {k: v.shape for k, v in small.model.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }


def test_a_corrected_model_comes_back_from_its_artifact(tmp_path) -> None:
    net = residual_net().eval()
    small = slimkit.quantize(net, [IMAGES], "torch", weights="percentile", weight_bits=4).eval()
    apply_(small.model, small.fake, [(IMAGES,)], ["rounding", "bias"])
    slimkit.export(small, IMAGES[:1], "torch", directory=tmp_path / "net")
    loaded = slimkit.load(tmp_path / "net", model=residual_net())
    torch.testing.assert_close(loaded(IMAGES), small(IMAGES), rtol=1e-4, atol=1e-4)


def test_an_unknown_correction_and_no_data_are_refused() -> None:
    small = simulated(conv_norm(), [IMAGES])
    with pytest.raises(QuantizationError, match="called 'adaround'"):
        apply_(small.model, small.fake, [(IMAGES,)], "adaround")
    with pytest.raises(QuantizationError, match="no batch"):
        apply_(small.model, small.fake, [])


def test_corrections_take_batches_of_several_inputs_and_shapes() -> None:
    net = lively(models.two_inputs()).eval()
    batches = [(normal(64, 8, seed=n), normal(64, 3, seed=n + 9)) for n in range(3)]
    small = simulated(net, [(batches[0], 0)], INPUTS.narrowed(4))
    found = apply_(small.model, small.fake, batches, ["rounding", "bias"])
    assert found[0].name == "rounding"
    assert found[0].after_db > found[0].before_db
    odd = [(IMAGES[:4],), (normal(4, 3, 12, 12),), (normal(3, 3, 9, 9),)]
    small = simulated(residual_net(), [x for (x,) in odd], INPUTS.narrowed(4))
    found = apply_(small.model, small.fake, odd, "rounding")
    assert found[0].after_db > found[0].before_db


@pytest.mark.parametrize("grid", [Grid(bits=4), Grid(bits=4, signed=False, symmetric=False)])
def test_rounding_suits_weights_that_share_one_scale(grid: Grid) -> None:
    net = residual_net().eval()
    small = simulated(net, [IMAGES], replace(INPUTS, weights=grid)).eval()
    before = (small(IMAGES) - net(IMAGES)).square().mean()
    rounding_(small.model, net, small.fake, (IMAGES,))
    assert (small(IMAGES) - net(IMAGES)).square().mean() < before
