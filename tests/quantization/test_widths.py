"""Weights as wide as the processor sums rightly."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import normal, residual_net
from torch import Tensor

import slimkit
from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.onnx_sessions import summed_bits
from slimkit.quantization.widths import width_remark
from slimkit.recipe import Recipe
from slimkit.training.quantization import scheme_of

X = normal(8, 3, 8, 8)


class Narrow(OnnxRuntime):
    def weight_bits(self) -> int:
        return 7


class Wide(OnnxRuntime):
    def weight_bits(self) -> None:
        return None


def by_twos(x: np.ndarray, w: np.ndarray) -> int:
    """What VPMADDUBSW and VPMADDWD make of a product of bytes: pairs are clipped to 16 bits."""
    products = x.astype(np.int64) * w.astype(np.int64)
    return int(products.reshape(-1, 2).sum(1).clip(-(2**15), 2**15 - 1).sum())


def by_all(x: np.ndarray, w: np.ndarray) -> int:
    return int(x.astype(np.int64) @ w.astype(np.int64))


@pytest.mark.parametrize(("arithmetic", "bits"), [(by_twos, 7), (by_all, None)])
def test_a_processor_is_known_by_a_sum(arithmetic, bits: int | None) -> None:
    def load(folder: Path):
        model = onnx.load(folder / "model.onnx")
        weight = onnx.numpy_helper.to_array(model.graph.initializer[0])[:, 0]

        def run(x: Tensor) -> list[Tensor]:
            return [torch.tensor([[arithmetic(x.numpy()[0], weight)]])]

        return run

    assert summed_bits(load) == bits


def test_nothing_of_seven_bits_overflows() -> None:
    worst = 2 ** (7 - 1) - 1
    for weight in (worst, -worst):
        x, w = np.full(8, 255, np.uint8), np.full(8, weight, np.int8)
        assert by_twos(x, w) == by_all(x, w)
    eight = np.full(8, 127, np.int8)
    assert by_twos(np.full(8, 255, np.uint8), eight) != by_all(np.full(8, 255, np.uint8), eight)


@pytest.mark.parametrize(
    ("backend", "asked", "bits"),
    [(Narrow, None, 7), (Narrow, 8, 8), (Narrow, 4, 4), (Wide, None, 8), (Wide, 7, 7)],
)
def test_weights_are_as_wide_as_asked_or_else_as_is_right(backend, asked, bits: int) -> None:
    made = slimkit.quantize(residual_net().eval(), [X], backend(), weight_bits=asked)
    assert made.fake.scheme.weights.bits == bits


@pytest.mark.parametrize(("asked", "bits"), [(None, 7), (8, 8)])
def test_training_on_integers_takes_the_same_width(monkeypatch, asked, bits: int) -> None:
    monkeypatch.setattr(OnnxRuntime, "weight_bits", lambda self: 7)
    recipe = Recipe.parse({"export": ["onnxruntime"], "quantize": {"weight_bits": asked}})
    assert scheme_of(recipe.export[0], recipe.quantize).weights.bits == bits


def test_the_file_sums_the_largest_values_rightly(tmp_path: Path) -> None:
    """Here, whatever this processor is: 255 times the largest weight, 64 times."""
    net = torch.nn.Linear(64, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    x = torch.cat([torch.ones(1, 64), torch.zeros(1, 64)])
    for name in ("onnxruntime", "ncnn"):
        int8 = slimkit.quantize(net, [x], name, activations="minmax")
        artifact = slimkit.export(int8, x, name, directory=tmp_path / name)
        torch.testing.assert_close(artifact.run(x)[0], torch.tensor([64.0]), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("backend", "asked", "said"),
    [
        (Narrow, None, "weights are of 7 bits: sums of products of 8-bit weights overflow"),
        (Narrow, 8, "overflow on the processor that runs the file: leave weight_bits out"),
        (Narrow, 7, None),
        (Narrow, 4, None),
        (Wide, None, None),
        (Wide, 8, None),
    ],
)
def test_a_remark_says_why_and_what_to_do(backend, asked: int | None, said: str | None) -> None:
    found = width_remark(backend(), asked)
    assert found is None if said is None else said in found


def test_preflight_says_it_of_int8_only() -> None:
    float_, int8 = slimkit.preflight(residual_net().eval(), X, Narrow())
    assert "7 bits" not in str(float_)
    assert "in the file: weights are of 7 bits" in str(int8)


def test_exporting_wider_weights_warns(tmp_path: Path) -> None:
    net = residual_net().eval()
    wide = slimkit.quantize(net, [X], Narrow(), weight_bits=8)
    with pytest.warns(UserWarning, match="overflow on the processor that runs the file"):
        slimkit.export(wide, X, Narrow(), directory=tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slimkit.export(slimkit.quantize(net, [X], Narrow()), X, Narrow(), directory=tmp_path / "b")
