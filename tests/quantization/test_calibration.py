"""Calibration reads its batches as a stream."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from nets import INPUTS, Device, normal
from torch import Tensor, nn

from slimkit.errors import QuantizationError
from slimkit.quantization.calibration import quantize


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def scales(small: nn.Module) -> list[Tensor]:
    return [small.fake[name].qparams()[0] for name in small.fake.sites.activations]


def test_an_iterator_that_gives_its_batches_once_is_enough() -> None:
    batches = [normal(4, 6, seed=seed) * (seed + 1) for seed in range(3)]
    assert scales(quantize(net(), iter(batches))) == scales(quantize(net(), batches))


@pytest.mark.parametrize("batches", [[(0, 6)], [(4, 6), (0, 6)]], ids=["first", "later"])
def test_a_batch_without_a_sample_is_refused(batches: list[tuple[int, ...]]) -> None:
    with pytest.raises(QuantizationError, match=f"batch {len(batches) - 1} holds no sample"):
        quantize(net(), [torch.zeros(shape) for shape in batches])


def test_no_more_batches_are_taken_than_asked_for() -> None:
    taken = []
    quantize(net(), (taken.append(n) or normal(4, 6) for n in range(10)), batches=3)
    assert taken == [0, 1, 2]


def test_batches_are_let_go_one_by_one() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for seed in range(12):
            x = normal(4, 6, seed=seed)
            alive.append(weakref.ref(x))
            yield x
            del x
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    quantize(net(), stream(), batches=12)
    assert most <= 2  # the first, which gave the shapes, and the last


class Pairs(nn.Module):
    """Takes batches of an even number of samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(len(x) // 2, 12))


def test_a_model_that_takes_no_single_sample_is_quantized() -> None:
    small = quantize(Pairs(), [normal(4, 6)], backend=Device(INPUTS))
    assert small(normal(4, 6)).shape == (2, 3)
    assert list(small.fake.sites.activations)


class Mixed(nn.Module):
    """Its second input has no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        return mixing @ self.linear(x)


def test_inputs_without_a_common_batch_are_taken() -> None:
    small = quantize(Mixed(), [(normal(4, 6), normal(5, 4))], backend=Device(INPUTS))
    assert small(normal(4, 6), normal(5, 4)).shape == (5, 6)


class Bad(nn.Module):
    """Gives one bad value among many between its layers."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.first, self.second, self.value = nn.Linear(6, 600), nn.Linear(600, 3), value

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden[1, 300] = self.value
        return self.second(hidden)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_inside_the_model_is_found(value: float) -> None:
    with pytest.raises(QuantizationError, match="second:linear:0.*NaN or infinity"):
        quantize(Bad(value), [normal(4, 6)], backend=Device(INPUTS))


def test_the_largest_float_is_no_infinity() -> None:
    quantize(Bad(3e38), [normal(4, 6)], backend=Device(INPUTS), activations="minmax")


@pytest.mark.parametrize("method", ["minmax", "moving-average", "percentile", "kl", "mse", "aciq"])
@pytest.mark.parametrize("of", ["weights", "activations"])
def test_every_method_quantizes_either_side(method: str, of: str) -> None:
    model, x = net(), normal(64, 6)
    small = quantize(model, [x], **{of: method})
    noise = (small(x) - model(x)).square().mean() / model(x).square().mean()
    assert 0 < noise < 1e-2
