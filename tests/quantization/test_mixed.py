"""Sensitivity of the places that are rounded, and the fewest of them in float."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import slimkit
from slimkit.errors import QuantizationError
from slimkit.quantization.mixed import fewest_in_float, without
from slimkit.quantization.sensitivity import kept_for, rank

X = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Outlier(nn.Module):
    """The second layer reads one channel a thousand times larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(4, 8, 1, bias=False)
        self.b = nn.Conv2d(8, 8, 1, groups=8, bias=False)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.a.weight[0] *= 1000
            self.b.weight[0] /= 1000

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))).relu())


def sqnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


@torch.no_grad()
def test_the_ranking_begins_with_the_place_that_breaks_the_network() -> None:
    net = Outlier().eval()
    quantized = slimkit.quantize(net, [X], "onnxruntime", activations="minmax")
    ranked = rank(quantized, [(X[:4],)])
    assert ranked[0].quantizer == "a:conv2d:0:out"
    assert ranked[0].calls == ("a:conv2d:0", "b:conv2d:0")
    assert ranked[0].sqnr_db < 20 < ranked[1].sqnr_db
    # by hand: only that tensor rounded
    scale, zero = quantized.fake["a:conv2d:0:out"].qparams()
    y = quantized.fake.scheme.activations.fake_quantize(net.a(X[:4]), scale, zero)
    z = net.d(net.c(net.b(y)).relu())
    assert ranked[0].sqnr_db == pytest.approx(sqnr(net(X[:4]), z), abs=0.01)


def test_an_interrupted_scan_goes_on_where_it_was() -> None:
    quantized = slimkit.quantize(Outlier().eval(), [X], "onnxruntime", activations="minmax")
    known: list = []

    def stop(one) -> None:
        known.append(one)
        if len(known) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank(quantized, [(X[:4],)], done=stop)
    assert quantized.fake.only is None
    scanned: list = []
    whole = rank(quantized, [(X[:4],)], known, scanned.append)
    assert len(scanned) == len(whole) - 3
    assert whole == rank(quantized, [(X[:4],)])


@torch.no_grad()
def test_auto_keeps_only_what_harms_and_the_file_does_as_well(tmp_path) -> None:
    net = Outlier().eval()
    plain = slimkit.quantize(net, [X], "onnxruntime", activations="minmax").eval()
    mixed = slimkit.quantize(
        net, [X], "onnxruntime", activations="minmax", keep_float="auto"
    ).eval()
    assert sqnr(net(X), plain(X)) < 20 < sqnr(net(X), mixed(X))
    assert set(mixed.fake.sites.skipped) == {"a:conv2d:0", "b:conv2d:0"}
    artifact = slimkit.export(mixed, X[:1], "onnxruntime", directory=tmp_path / "net", data=[X])
    # ONNX Runtime would round the float weights between integers with one scale for all channels
    assert sqnr(net(X), artifact.run(X)) > 20
    assert artifact.row.operators["QLinearConv"] == 1
    assert artifact.row.agreement.sqnr_db[0] > 60


@torch.no_grad()
def test_auto_with_a_metric_keeps_no_more_than_it_needs() -> None:
    net = Outlier().eval()
    asked: list = []

    def metric(module: nn.Module) -> float:
        assert not module.training
        asked.append(module)
        return sqnr(net(X), module(X)) if module is not net else 100.0

    quantized = slimkit.quantize(net, [X], "onnxruntime", activations="minmax").eval()
    same, kept = fewest_in_float(quantized, [(X[:4],)], evaluate=metric, least=1.0)
    assert same is quantized
    assert kept == []
    mixed, kept = fewest_in_float(quantized, [(X[:4],)], evaluate=metric, least=20.0)
    assert [one.quantizer for one in kept] == ["a:conv2d:0:out"]
    assert metric(mixed) >= 20
    with pytest.raises(QuantizationError, match="does not reach 1000.0000"):
        fewest_in_float(quantized, [(X[:4],)], evaluate=metric, least=1000.0)


def test_nothing_left_to_quantize_is_an_error() -> None:
    quantized = slimkit.quantize(nn.Sequential(nn.Conv2d(4, 4, 1)).eval(), [X], "ncnn")
    with pytest.raises(QuantizationError, match="nothing would be left"):
        without(quantized, ["0:conv2d:0"], (X[:1],))


def test_a_float_reader_frees_a_tensor_where_integer_layers_can_give_float() -> None:
    from dataclasses import replace

    from slimkit.calls import trace

    net = Outlier().eval()
    quantized = slimkit.quantize(net, [X], "onnxruntime")
    scheme, sites = quantized.fake.scheme, quantized.fake.sites
    traced = trace(net, (X[:1],))
    free = replace(scheme, float_outputs=True)
    assert kept_for("a:conv2d:0:out", sites, traced, scheme) == ["a:conv2d:0", "b:conv2d:0"]
    assert kept_for("a:conv2d:0:out", sites, traced, free) == ["b:conv2d:0"]
    assert kept_for("b/weight:weight", sites, traced, scheme) == ["b:conv2d:0"]
