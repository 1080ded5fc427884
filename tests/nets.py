"""Schemes and small networks that the tests of quantization, deployment and training share."""

from __future__ import annotations

import torch
from models import Net, conv
from torch import Tensor, nn
from torch.nn import functional

from slimkit.interfaces import Backend, Grid, Scheme
from slimkit.quantization.calibration import quantize

INPUTS = Scheme(
    activations=Grid(bits=8),
    weights=Grid(bits=8, per_channel=True),
    operations=frozenset({"conv2d", "linear", "add"}),
)
"""Every input of an operation is rounded in front of it; biases are float: like ncnn."""

TENSORS = Scheme(
    activations=Grid(bits=8, signed=False, symmetric=False),
    weights=Grid(bits=8, per_channel=True),
    operations=frozenset({"conv2d", "linear", "add", "cat", "mean"}),
    placement="tensors",
    keeps=frozenset({"max_pool2d", "flatten", "interpolate"}),
    fuses=frozenset({"relu", "batch_norm"}),
    bias_bits=32,
)
"""Each tensor is rounded once, where it is made; biases are int32: like ONNX Runtime."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """Images as networks of TensorFlow take them, all half-way between integers of a grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator) / 127.5 - 1


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with batch-norms as after a training: statistics, gammas and betas all differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.data.uniform_(low, high, generator=generator)

    for parameter in model.parameters():
        if parameter.dim() > 1:
            scale = parameter[0].numel() ** -0.5
            parameter.data.normal_(0, 1.4 * scale, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            draw(module.running_mean, -0.5, 0.5)
            draw(module.running_var, 0.5, 2.0)
            draw(module.weight, 0.5, 1.5)
            draw(module.bias, -0.3, 0.3)
    return model


def conv_norm(bias: bool = False) -> nn.Module:
    """Image to classes: convolution, batch-norm, relu, pooling, linear."""
    body = [conv(3, 8, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return lively(nn.Sequential(*body, nn.Flatten(), nn.Linear(8 * 16, 5)))


def residual_net() -> nn.Module:
    """Image (3, 8, 8) to 4 classes, with batch-norm and a residual addition."""

    def flow(net: Net, x: Tensor) -> Tensor:
        x = functional.relu(net.bn0(net.stem(x)))
        x = functional.relu(x + net.bn2(net.up(functional.relu(net.bn1(net.down(x))))))
        return net.head(x.mean((2, 3)))

    layers = {
        "stem": conv(3, 8, bias=False),
        "bn0": nn.BatchNorm2d(8),
        "down": conv(8, 6, bias=False),
        "bn1": nn.BatchNorm2d(6),
        "up": conv(6, 8, bias=False),
        "bn2": nn.BatchNorm2d(8),
        "head": nn.Linear(8, 4),
    }
    return lively(Net(flow, **layers))


class Shifted(nn.Module):
    """Adds a parameter and a buffer, which are no tensors of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 4)
        self.shift = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.register_buffer("offset", torch.ones(1, 3, 1, 1))

    def forward(self, x):
        return self.shift + self.a(self.offset + x)


class Two(nn.Module):
    """Takes two inputs, gives named outputs of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = self.left(x), self.right(y)
        return {"sum": a + b, "larger": a > b, "best": a.argmax(-1), "first": a}


class Device(Backend):
    """A backend of which only the scheme is asked for."""

    def __init__(self, scheme) -> None:
        self.scheme = scheme

    def compile(self, deployable, directory):
        raise NotImplementedError

    def load(self, directory, threads=1):
        raise NotImplementedError


def simulated(model: nn.Module, data, scheme=INPUTS, **options):
    return quantize(model, data, Device(scheme), activations="minmax", **options)
