"""The simulation of integer arithmetic in a float model."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import INPUTS, TENSORS, Device, conv_norm, normal, residual_net, simulated
from torch import Tensor, nn
from torch.nn import functional

from slimkit.errors import QuantizationError
from slimkit.quantization.calibration import quantize


def integers(x: np.ndarray, scale: float | np.ndarray, zero: int, low: int, high: int):
    return np.clip(np.rint(x / scale) + zero, low, high).astype(np.int64)


def test_linear_layer_equals_integer_arithmetic_in_numpy() -> None:
    net, x = nn.Linear(6, 4), normal(5, 6)
    small = simulated(net, [x])
    w, b = net.weight.detach().double().numpy(), net.bias.detach().double().numpy()
    sx, sw = np.abs(x.double().numpy()).max() / 127, np.abs(w).max(1) / 127
    qx = integers(x.double().numpy(), sx, 0, -127, 127)
    qw = integers(w, sw[:, None], 0, -127, 127)
    expected = (qx @ qw.T) * (sx * sw) + b
    np.testing.assert_allclose(small(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_convolutions_with_relu_equal_integer_arithmetic_in_numpy() -> None:
    first, second = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
    x = normal(1, 2, 4, 4)
    small = simulated(nn.Sequential(first, nn.ReLU(), second), [x], TENSORS)

    def layer(values, zero, step, weight):
        w = weight.detach().double().numpy()[:, :, 0, 0]
        sw = np.abs(w).max(1) / 127
        sums = np.einsum("oi,ihw->ohw", integers(w, sw[:, None], 0, -127, 127), values - zero)
        return sums * (sw * step)[:, None, None]

    def grid(values):
        low, high = min(values.min(), 0), max(values.max(), 0)
        step = (high - low) / 255
        return step, int(np.rint(-low / step))

    plain = x[0].double().numpy()
    step, zero = grid(plain)
    qx = integers(plain, step, zero, 0, 255)
    # the hidden range is that of the float model
    float_hidden = functional.relu(first(x)).detach()[0].double().numpy()
    hidden_step, hidden_zero = grid(float_hidden)
    hidden = np.maximum(layer(qx, zero, step, first.weight), 0)
    qh = integers(hidden, hidden_step, hidden_zero, 0, 255)
    expected = layer(qh, hidden_zero, hidden_step, second.weight)
    np.testing.assert_allclose(small(x).detach()[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter_through_the_rounding() -> None:
    small = simulated(residual_net(), [normal(4, 3, 8, 8)], TENSORS)
    small(normal(4, 3, 8, 8)).square().sum().backward()
    assert [n for n, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_weight_ranges_follow_the_weights() -> None:
    x = normal(4, 6)
    small = simulated(nn.Linear(6, 3, bias=False), [x])
    before = small(x)
    with torch.no_grad():
        small.model.weight *= 64  # a power of two: the same integers, another scale
    assert torch.equal(small(x), 64 * before)


def test_activation_ranges_are_those_of_the_calibration() -> None:
    small = simulated(nn.Linear(6, 3), [normal(4, 6)])
    before = {k: v.clone() for k, v in small.fake.named_buffers() if "in0" in k}
    small.train()(1000 * normal(4, 6))
    assert before
    assert all(torch.equal(v, dict(small.fake.named_buffers())[k]) for k, v in before.items())


def test_ranges_that_the_runtime_prescribes_are_not_calibrated() -> None:
    operations = TENSORS.operations | {"sigmoid"}
    scheme = replace(TENSORS, operations=operations, prescribed=(("sigmoid", 1 / 256, 0),))
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1))
    fake = simulated(net, [normal(4, 3, 8, 8)], scheme).fake
    assert fake["1:sigmoid:0:out"].qparams() == (1 / 256, 0)
    free = simulated(net, [normal(4, 3, 8, 8)], replace(scheme, prescribed=())).fake
    assert free["1:sigmoid:0:out"].qparams()[0] != 1 / 256


def test_state_dict_carries_the_ranges_into_another_model() -> None:
    x = normal(4, 3, 8, 8)
    trained = simulated(conv_norm(), [x], TENSORS)
    other = simulated(conv_norm(), [9 * normal(4, 3, 8, 8, seed=1)], TENSORS)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.eval()(x), trained.eval()(x))


def test_copies_are_independent() -> None:
    x = normal(4, 3, 8, 8)
    small = simulated(conv_norm(), [x]).eval()
    before = small(x)
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.model[0].weight *= 3
        for buffer in other.fake.buffers():
            buffer.mul_(2)
    assert torch.equal(small(x), before)


def test_a_copy_simulates_too() -> None:
    x = normal(4, 3, 8, 8)
    small = simulated(conv_norm(), [x]).eval()
    assert torch.equal(copy.deepcopy(small)(x), small(x))


def test_forward_hooks_of_the_model_still_fire() -> None:
    small = simulated(conv_norm(), [normal(4, 3, 8, 8)])
    seen = []
    small.model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    small(normal(1, 3, 8, 8))
    assert seen == [(1, 8, 8, 8)]


def test_nothing_is_rounded_once_the_forward_is_over() -> None:
    x = normal(4, 3, 8, 8)
    small = simulated(conv_norm(), [x]).eval()
    rounded = small(x)
    assert not torch.equal(small.model(x), rounded)


def test_an_error_in_the_forward_leaves_no_hook_behind() -> None:
    small = simulated(conv_norm(), [normal(4, 3, 8, 8)]).eval()
    x = normal(2, 3, 8, 8)
    before = small(x)
    with pytest.raises(RuntimeError):
        small(normal(2, 5, 8, 8))
    assert torch.equal(small(x), before)


def test_the_given_model_is_untouched() -> None:
    net = conv_norm().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    simulated(net, [normal(4, 3, 8, 8)], TENSORS)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m for m in net.modules() if not m.training or m._forward_hooks] == []


def test_training_flags_are_those_of_the_given_model() -> None:
    net = conv_norm().train()
    net[1].eval()  # a frozen batch-norm
    small = simulated(net, [normal(4, 3, 8, 8)])
    assert small.training
    assert [name for name, m in small.model.named_modules() if not m.training] == ["1"]


def test_only_as_many_batches_as_asked_for_are_used() -> None:
    x = normal(4, 6)
    small = simulated(nn.Linear(6, 3), [x, 50 * x], batches=1)
    name = small.fake.sites.activations[0]
    assert small.fake[name].qparams()[0].item() == pytest.approx(x.abs().max().item() / 127)


def test_labels_beside_the_inputs_are_ignored() -> None:
    x, net = normal(4, 6), nn.Linear(6, 3)
    assert torch.equal(simulated(net, [(x, torch.ones(4))])(x), simulated(net, [x])(x))


class NanInside(nn.Module):
    """Gives NaN between its layers for ordinary data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sqrt(self.a(x)))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (nn.Linear(6, 3), [], "the calibration data is empty"),
        (nn.Linear(6, 3), [torch.full((2, 6), torch.nan)], "batch 0 holds NaN or infinity"),
        (nn.Linear(6, 3), [normal(2, 6), torch.full((2, 6), torch.inf)], "batch 1 holds NaN"),
        (nn.Linear(6, 3), [normal(2, 5)], r"does not run on calibration batch 0 .*\(2, 5\)"),
        (nn.Linear(6, 3), [normal(2, 6), normal(2, 5)], "does not run on calibration batch 1"),
        (NanInside(), [normal(2, 6)], "b:linear:0:in0 .*NaN or infinity"),
    ],
)
@pytest.mark.parametrize("activations", ["minmax", "percentile"])
def test_unusable_calibration_is_said(model, data, message: str, activations: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize(model, data, Device(INPUTS), activations=activations)


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(QuantizationError, match=r"nothing of Sequential would be .*conv2d"):
        simulated(nn.Sequential(nn.LayerNorm(6), nn.ReLU()), [normal(2, 6)])


def test_everything_kept_in_float_is_an_error_that_says_why() -> None:
    with pytest.raises(QuantizationError, match=r"kept in float by '\*'"):
        simulated(conv_norm(), [normal(2, 3, 8, 8)], keep_float=["*"])
