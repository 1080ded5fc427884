"""The integer simulation: equal to what the runtime computes, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import slimkit
from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.quantization.arithmetic import (
    ARITHMETICS,
    fixed_point_sum,
    float32,
    scaled_product,
)
from slimkit.quantization.exact import exact


class Mobile(nn.Module):
    """Depthwise and pointwise layers, batch-norms, ReLU6 and uneven padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem_norm(self.stem(functional.pad(x, (0, 1, 0, 1)))))
        x = functional.relu6(self.norm(self.pointwise(self.depthwise(x).relu())))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = Mobile()
    for norm in (made.stem_norm, made.norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(-1, 2)
        norm.bias.data.normal_()
    return made.eval()


@pytest.mark.parametrize("backend", ["onnxruntime", "ncnn"])
@torch.no_grad()
def test_the_file_computes_what_the_integer_simulation_does(backend, net, tmp_path) -> None:
    x = torch.randn(64, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    quantized = slimkit.quantize(net, [x], backend).eval()
    artifact = slimkit.export(quantized, x[:1], backend, directory=tmp_path / "net")
    wanted = artifact.run(x)
    found = exact(quantized, (x[:1],))(x)
    # the last layer's float32 sum may be rounded once more or once less
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    if backend == "onnxruntime":  # the simulation in float takes some values for their neighbours
        assert (quantized(x) - wanted).abs().max() > 1e-4 * wanted.abs().max()
    assert artifact.agreement == 1.0


def test_a_sum_of_integers_is_scaled_as_onnx_runtime_does() -> None:
    """By hand in NumPy: the sum of products, with its bias, times one float32 factor."""
    layer = nn.Conv2d(2, 1, 1)
    layer.weight.data = torch.tensor([[[[0.5]], [[-0.25]]]])
    layer.bias.data = torch.tensor([0.5])
    net = nn.Sequential(layer, nn.Conv2d(1, 1, 1)).eval()
    x = torch.tensor([[[[1.5]], [[0.5]]]])
    quantized = slimkit.quantize(net, [x], "onnxruntime", activations="minmax")
    fake = quantized.fake
    step = float(fake["input0"].qparams()[0])
    out = float(fake["0:conv2d:0:out"].qparams()[0])
    weight_step = 0.5 / 127
    q = np.rint(np.array([1.5, 0.5]) / step)
    w = np.rint(np.array([0.5, -0.25]) / weight_step)
    total = int(q @ w) + round(0.5 / (step * weight_step))
    product = np.float32(np.float32(step) * np.float32(weight_step)) / np.float32(out)
    expected = np.rint(np.float32(total) * np.float32(product)) * np.float32(out)
    seen: list[Tensor] = []
    simulated = exact(quantized, (x,))
    simulated.finished.network[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    simulated(x)
    assert seen[0].item() == pytest.approx(float(expected), abs=1e-7)


@pytest.mark.parametrize("name", list(ARITHMETICS))
@torch.no_grad()
def test_channels_of_a_grouped_transposed_convolution_keep_their_own_scale(name: str) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1)).eval()
    net[0].weight.copy_(torch.randint(-127, 128, (4, 3, 2, 2)))
    net[0].weight[:, :, 0, 0] = 127
    net[0].weight.mul_(torch.tensor([0.5, 2.0, 8.0])[:, None, None])
    net[0].bias.copy_(torch.arange(6.0))
    operations = OnnxRuntime.scheme.operations | {"conv_transpose2d"}
    x = torch.randint(0, 256, (4, 4, 3, 3)).float()
    x[0, 0, 0, :2] = torch.tensor([0.0, 255.0])

    class Backend(OnnxRuntime):
        scheme = replace(OnnxRuntime.scheme, operations=operations, arithmetic=name, bias_bits=None)

    quantized = slimkit.quantize(net, [x], Backend(), activations="minmax", weight_bits=8).eval()
    seen: list[Tensor] = []
    simulated = exact(quantized, (x[:1],))
    for module in (quantized.model[0], simulated.finished.network[0]):
        module.register_forward_hook(lambda _, args, output: seen.append(output))
    quantized(x)
    simulated(x)
    apart = (seen[1] - seen[0]).abs() > 1e-4 * seen[0].abs().max()
    assert apart.double().mean() < 0.01  # a value between two integers may go either way


def test_openvino_rounds_products_and_sums_one_after_the_other() -> None:
    """By hand in NumPy, with numbers for which a fused sum would differ in the last bit."""
    sums, bias = np.arange(1, 2001, dtype=np.float32), np.float32(0.1)
    step, scale = np.float32(0.013), np.float32(0.0071)
    wanted = np.float32(sums * np.float32(step * scale)) + bias
    found = ARITHMETICS["fused"].scaled(
        torch.from_numpy(sums), float32(0.013), float32(0.0071), float32(0.1), None
    )
    assert np.array_equal(found.numpy(), wanted)
    at_once = sums.astype(np.float64) * np.float64(np.float32(step * scale)) + np.float64(bias)
    assert not np.array_equal(at_once.astype(np.float32), wanted)


def test_xnnpack_multiplies_by_the_reciprocal_where_onnx_runtime_divides() -> None:
    """By hand in NumPy, at values half-way between two integers, as pixels are."""
    step = np.float32(2 / 255)
    x = (np.arange(256) / 127.5 - 1).astype(np.float32)
    multiplied = np.rint(x * (np.float32(1) / step)) - 1
    divided = np.rint(x / step) - 1
    assert not np.array_equal(multiplied, divided)
    for name, wanted in (("reciprocal", multiplied), ("requantize", divided)):
        found = ARITHMETICS[name].integers(torch.from_numpy(x), float32(2 / 255), -1, True)
        assert np.array_equal(found.numpy(), wanted)


def test_xnnpack_adds_in_fixed_point() -> None:
    """By hand: factors of 2**20 to 2**21 - 1, halves go up."""
    a, b = torch.tensor([3, -7, 127, 1]), torch.tensor([5, 2, -128, 0])
    found = fixed_point_sum(a, b, (0.5, 0.25), 1.0)
    # 2**21 steps of 2**-22: (3 * 0.5 + 5 * 0.25, ...) = 2.75, -3, 31.5, 0.5
    assert found.tolist() == [3, -3, 32, 1]
    assert fixed_point_sum(a, b, (0.5, 0.25), 1.0, sign=-1).tolist() == [0, -4, 96, 1]
    third = fixed_point_sum(torch.tensor([1]), torch.tensor([1]), (1 / 3, 1 / 3), 1e-6).item()
    factor = round(float(np.float32(1 / 3) / np.float32(1e-6)) * 2**2)
    assert third == (2 * factor + 2) >> 2


def test_xnnpack_multiplies_integers_by_one_factor() -> None:
    a, b = np.arange(-128, 128), np.arange(255, -1, -1)
    factor = np.float32(np.float32(0.013) * np.float32(0.0071)) / np.float32(0.021)
    wanted = np.rint((a * b).astype(np.float32) * factor)
    found = scaled_product(torch.from_numpy(a), torch.from_numpy(b), (0.013, 0.0071), 0.021)
    assert np.array_equal(found.numpy(), wanted)


def test_unknown_arithmetic_leaves_the_simulation_as_it_is(net) -> None:
    x = torch.randn(2, 3, 24, 24)
    quantized = slimkit.quantize(net, [x], "torch")
    quantized.fake.scheme = type(quantized.fake.scheme)(
        **{**vars(quantized.fake.scheme), "arithmetic": "unknown"}
    )
    assert exact(quantized, (x,)) is quantized
