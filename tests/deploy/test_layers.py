"""Where inside the model a deployed file departs from the simulation."""

from __future__ import annotations

import json

import pytest
import torch
from models import Net, conv
from nets import conv_norm, normal, residual_net
from torch import nn

import slimkit
from slimkit.builtin.backends.reference import Reference
from slimkit.deploy.deployed import compile_
from slimkit.deploy.folder import sha256
from slimkit.deploy.layers import as_plain, per_layer, spread
from slimkit.deploy.taps import Tapped, places
from slimkit.errors import ExportError
from slimkit.interfaces import tensors_of
from slimkit.registry import discover

X = normal(8, 3, 8, 8, seed=3)


def backend(name: str):
    return discover().create("backend", name)


def quantized(net: nn.Module, name: str = "torch") -> nn.Module:
    return slimkit.quantize(net.eval(), [normal(32, 3, 8, 8)], name).eval()


class Broken(Reference):
    """A runtime that computes the second layer with weights of twice the size."""

    def compile(self, deployable, directory):
        values = {**deployable.program.constants, **deployable.program.state_dict}
        (scale,) = [v for k, v in values.items() if k.endswith("layer1_scale")]
        scale.mul_(2)
        super().compile(deployable, directory)


class Merging(Reference):
    """A runtime that computes differently where more outputs are asked for."""

    def compile(self, deployable, directory):
        super().compile(deployable, directory)
        outputs = len(deployable.program.graph_signature.user_outputs)
        (directory / "outputs").write_text(str(outputs))

    def load(self, directory, threads=1):
        run = super().load(directory, threads)
        shift = 0.01 * (int((directory / "outputs").read_text()) > 1)
        return lambda *inputs: [t + shift for t in run(*inputs)]

    def operators(self, directory):
        return {"Fused": int((directory / "outputs").read_text())}


class OneOutput(Reference):
    """A runtime whose files have one output."""

    def check(self, deployable):
        many = len(deployable.program.graph_signature.user_outputs) > 1
        return ["this runtime gives one output"] if many else []


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "ncnn"])
@pytest.mark.parametrize("make", [residual_net, lambda: quantized(residual_net())])
def test_a_right_file_departs_nowhere(name: str, make) -> None:
    model = make()
    if not isinstance(model, Net):
        model = quantized(residual_net(), name)
    report = per_layer(model.eval(), backend(name), (X,))
    assert report.first is None
    assert report.lowest.sqnr_db > 40
    assert report.inputs == 8


def test_layers_are_in_order_of_execution_with_their_activation_and_the_output_last() -> None:
    report = per_layer(quantized(residual_net()), Reference(), (X,))
    names = [layer.layer for layer in report.layers]
    assert names == ["stem", "down", "up", "add", "mean", "head (output)"]
    assert all(layer.largest_steps is not None for layer in report.layers[:-1])
    assert report.layers[-1].largest_steps is None  # the output stays in float


def test_the_first_layer_that_departs_is_named() -> None:
    report = per_layer(quantized(residual_net()), Broken(), (X,))
    assert report.first is not None
    assert report.first.layer == "down"
    assert report.layers[0].sqnr_db > 40
    assert report.first.sqnr_db < 10
    assert report.first.departed > 0.5
    assert "departs from the simulation at down" in report.verdict
    assert "the 1 in front of it hold" in report.verdict


def test_the_artifact_names_the_layer_and_stays_as_it_is(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"agrees with its simulation in 75\.0% only"):
        artifact = slimkit.export(
            quantized(residual_net()), X, Broken(), directory=tmp_path / "small"
        )
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    before = {p: sha256(p) for p in files}
    assert artifact.per_layer(X).first.layer == "down"
    assert {p: sha256(p) for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_model_is_untouched() -> None:
    model = quantized(residual_net())
    kind, before = type(model.model), model(X)
    per_layer(model, Reference(), (X,))
    assert type(model.model) is kind
    assert torch.equal(model(X), before)


def test_tensors_that_are_written_into_later_are_compared_as_they_were_made(tmp_path) -> None:
    def flow(net, x):
        y = net.a(x)
        z = net.b(y)
        y += 5
        return net.c(y) + z

    net = Net(flow, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4)).eval()
    found = places(net, (X,))
    assert [place.layer for place in found] == ["a", "b", "c"]
    tapped = Tapped(net, found, (X,))
    _, (y, *_) = tapped.model(X)
    assert torch.equal(y, net.a(X))
    _, deployed = compile_(tapped.model, Reference(), (X,), tmp_path / "file")
    torch.testing.assert_close(deployed.flat(X)[1], net.a(X))


def test_what_the_runtime_does_otherwise_with_more_outputs_is_said() -> None:
    report = per_layer(conv_norm().eval(), Merging(), (X,))
    assert report.operators == {"Fused": (1, 2)}
    assert 0 < report.same_db < 100
    assert len(report.reservations) == 2
    assert "does not compute what the real file does" in report.reservations[0]


def test_the_same_file_needs_no_reservation() -> None:
    report = per_layer(conv_norm().eval(), Reference(), (X,))
    assert report.same_db > 100
    assert report.reservations == []


def test_too_many_layers_are_thinned_out_and_counted() -> None:
    report = per_layer(quantized(residual_net()), Reference(), (X,), most=2)
    assert [layer.layer for layer in report.layers] == ["stem", "mean", "head (output)"]
    assert report.left_out == 3
    assert "3 tensors in between were left out" in report.reservations[-1]


def test_a_runtime_that_cannot_give_inner_tensors_is_an_error() -> None:
    with pytest.raises(ExportError, match="cannot be compiled with its inner tensors as outputs"):
        per_layer(conv_norm().eval(), OneOutput(), (X,))


def test_only_so_many_samples_are_compared() -> None:
    assert per_layer(conv_norm().eval(), Reference(), (X,), samples=3).inputs == 3


def test_a_threshold_above_what_is_reached_names_the_first_layer_below() -> None:
    model = quantized(residual_net())
    reached = [layer.sqnr_db for layer in per_layer(model, Broken(), (X,)).layers]
    report = per_layer(model, Broken(), (X,), least_db=max(reached[1:]) + 1)
    assert report.first.layer == "down"


def test_nested_outputs_are_numbered_where_no_layer_makes_them() -> None:
    net = Net(lambda net, x: {"a": net.a(x), "b": x.sum(1)}, a=conv(3, 4)).eval()
    report = per_layer(net, Reference(), (X,))
    assert [layer.layer for layer in report.layers] == ["a (output)", "output 1"]
    assert len(tensors_of(net(X))) == 2


def test_the_report_is_strict_json() -> None:
    report = per_layer(quantized(conv_norm()), Reference(), (X,))
    found = json.loads(json.dumps(as_plain(report), allow_nan=False))
    assert found["layers"][0]["layer"] == "0"
    assert found["first"] is None
    assert found["layers"][0]["sqnr_db"] is None or found["layers"][0]["sqnr_db"] > 40


def test_numbers_are_spread_over_the_whole_range() -> None:
    assert spread(100, 5)[0] == 0
    assert spread(100, 5)[-1] == 99
    assert len(set(spread(100, 5))) == 5
