"""Batch-norms that are folded before weights are rounded, for scales that are powers of two."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.calls import trace
from slimkit.errors import QuantizationError
from slimkit.interfaces import Grid
from slimkit.quantization.calibration import quantize
from slimkit.quantization.fake import FakeQuantization
from slimkit.quantization.finished import finish
from slimkit.quantization.folding import absorb_
from slimkit.testing.networks import made


class Shifting(OnnxRuntime):
    scheme = replace(
        OnnxRuntime.scheme,
        activations=Grid(power_of_two=True),
        weights=Grid(per_channel=True, power_of_two=True),
        arithmetic="unknown",
    )


@pytest.mark.parametrize("network", ["convolutional", "residual"])
def test_the_model_computes_what_it_did_under_the_same_names(network):
    model, x = made(network, 4)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        absorb_(model, trace(model, (x,)))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.01}])
def test_a_batch_norm_keeps_its_shift_and_loses_its_factor(options):
    norm = nn.BatchNorm2d(3, **options)
    norm.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    model = nn.Sequential(nn.Conv2d(2, 3, 1), norm).eval()
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        absorb_(model, trace(model, (x,)))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        alone = norm(torch.zeros(1, 3, 1, 1)), norm(torch.ones(1, 3, 1, 1))
    torch.testing.assert_close(alone[1] - alone[0], torch.ones(1, 3, 1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", ["convolutional", "residual"])
def test_every_scale_of_the_finished_model_is_a_power_of_two(network):
    model, x = made(network, 4)
    program = finish(quantize(model, [x], Shifting()), (x[:1],)).program
    tensors = {**program.state_dict, **program.constants}
    scales = [t for name, t in tensors.items() if name.endswith("_scale")]
    assert len(scales) >= 4
    for scale in scales:
        assert (torch.frexp(scale)[0] == 0.5).all()


def test_the_finished_model_computes_what_the_simulation_does():
    model, x = made("residual", 4)
    small = quantize(model, [x], Shifting()).eval()
    with torch.no_grad():
        found = finish(small, (x,)).program.module()(x)
        # biases are integers there; one step of an activation would be a hundred times as much
        torch.testing.assert_close(found, small(x), rtol=0, atol=5e-5)


def test_a_layer_that_serves_two_calls_is_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x))))

    with pytest.raises(QuantizationError, match="serve several calls"):
        quantize(Twice().eval(), [torch.randn(2, 3, 4, 4)], Shifting())


def test_training_with_a_batch_norm_that_changes_scales_is_refused():
    model, x = made("residual", 2)
    model.down_norm.running_var.fill_(3.0)
    make = lambda grid: None  # noqa: E731  (never called)
    with pytest.raises(QuantizationError, match="quantize after the training"):
        FakeQuantization.of(model, (x,), Shifting.scheme, make, make)


def test_a_batch_norm_that_is_changed_after_quantization_is_refused():
    model, x = made("residual", 4)
    small = quantize(model, [x], Shifting())
    small.model.down_norm.running_var.mul_(3.0)
    with pytest.raises(QuantizationError, match="was changed since"):
        finish(small, (x,))


def test_other_schemes_leave_batch_norms_alone():
    model, x = made("residual", 4)
    small = quantize(model, [x], OnnxRuntime())
    assert torch.equal(small.model.down_norm.running_var, model.down_norm.running_var)
