"""Small models, one for each way in which channels hang together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Net(nn.Module):
    """A module made of named layers and a function that says how data flows through them."""

    def __init__(self, flow: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.flow = flow
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.flow(self, *inputs)


def conv(fan_in: int, fan_out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, **options)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def chain() -> nn.Module:
    """Two convolutions with batch-norm, flattened into a linear layer."""
    body = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(6 * 64, 5))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def residual() -> nn.Module:
    """A residual stream that three convolutions share."""

    def flow(net: Net, x: Tensor) -> Tensor:
        x = functional.relu(net.bn0(net.stem(x)))
        x = functional.relu(x + net.bn2(net.up(functional.relu(net.bn1(net.down(x))))))
        x = functional.relu(x + net.more(x))
        return net.head(pooled(x))

    return Net(
        flow,
        stem=conv(3, 8),
        bn0=nn.BatchNorm2d(8),
        down=conv(8, 6),
        bn1=nn.BatchNorm2d(6),
        up=conv(6, 8),
        bn2=nn.BatchNorm2d(8),
        more=conv(8, 8),
        head=nn.Linear(8, 4),
    )


def concatenation() -> nn.Module:
    """Two branches side by side, with one batch-norm over both."""

    def flow(net: Net, x: Tensor) -> Tensor:
        return net.head(pooled(functional.relu(net.bn(torch.cat([net.a(x), net.b(x)], 1)))))

    return Net(flow, a=conv(3, 8), b=conv(3, 6), bn=nn.BatchNorm2d(14), head=nn.Linear(14, 4))


def depthwise() -> nn.Module:
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU()]
    return nn.Sequential(
        *layers, conv(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


def grouped() -> nn.Module:
    """A grouped convolution between two others, whose groups must lose as much each."""
    layers = [conv(3, 8), nn.ReLU(), conv(8, 8, groups=2), nn.ReLU(), conv(8, 16), nn.ReLU()]
    return nn.Sequential(*layers, conv(16, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def squeeze_excite() -> nn.Module:
    """Channels scaled by a sigmoid gate that is computed from them."""

    def flow(net: Net, x: Tensor) -> Tensor:
        x = functional.relu(net.stem(x))
        gate = torch.sigmoid(net.widen(functional.relu(net.squeeze(pooled(x)))))
        return net.head(pooled(x * gate[:, :, None, None]))

    return Net(
        flow,
        stem=conv(3, 8),
        squeeze=nn.Linear(8, 4),
        widen=nn.Linear(4, 8),
        head=nn.Linear(8, 4),
    )


def sigmoid_chain() -> nn.Module:
    """An activation that is not zero at zero, so that removing is not the same as zeroing."""
    return nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4))


def layernorm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


def transposed() -> nn.Module:
    up = nn.ConvTranspose2d(8, 6, 2, stride=2)
    return nn.Sequential(conv(3, 8), nn.ReLU(), up, nn.ReLU(), conv(6, 2))


def conv1d() -> nn.Module:
    first, second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 6, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(60, 2))


def functional_call() -> nn.Module:
    """`b` is never called: its weight is read by a functional convolution."""

    def flow(net: Net, x: Tensor) -> Tensor:
        x = functional.relu(net.a(x))
        x = functional.relu(functional.conv2d(x, net.b.weight, net.b.bias, padding=1))
        return net.head(pooled(functional.relu(net.c(x))))

    return Net(flow, a=conv(3, 8), b=conv(8, 6), c=conv(6, 16), head=nn.Linear(16, 4))


def two_inputs() -> nn.Module:
    def flow(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return net.head(functional.relu(net.a(x) + net.b(y)))

    return Net(flow, a=nn.Linear(8, 10), b=nn.Linear(3, 10), head=nn.Linear(10, 4))


def shared() -> nn.Module:
    """One convolution that is called twice."""

    def flow(net: Net, x: Tensor) -> Tensor:
        x = functional.relu(net.a(x))
        return net.head(pooled(functional.relu(net.twice(functional.relu(net.twice(x))))))

    return Net(flow, a=conv(3, 8), twice=conv(8, 8), head=nn.Linear(8, 2))


def prelu() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def flipped() -> nn.Module:
    """Reads its channels in reverse."""

    def flow(net: Net, x: Tensor) -> Tensor:
        return net.b(functional.relu(net.a(x)).flip(1))

    return Net(flow, a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 4, bias=False))


def chunked() -> nn.Module:
    """Two layers that each read one half of a layer's channels."""

    def flow(net: Net, x: Tensor) -> Tensor:
        left, right = functional.relu(net.stem(x)).chunk(2, 1)
        return net.head(functional.relu(net.a(left) + net.b(right)))

    return Net(
        flow, stem=nn.Linear(8, 8), a=nn.Linear(4, 10), b=nn.Linear(4, 10), head=nn.Linear(10, 4)
    )


IMAGE = (2, 3, 8, 8)
PRUNABLE: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "chain": (chain, (IMAGE,)),
    "mlp": (mlp, ((2, 8),)),
    "residual": (residual, (IMAGE,)),
    "concatenation": (concatenation, (IMAGE,)),
    "depthwise": (depthwise, (IMAGE,)),
    "squeeze_excite": (squeeze_excite, (IMAGE,)),
    "sigmoid_chain": (sigmoid_chain, ((2, 8),)),
    "layernorm_mlp": (layernorm_mlp, ((2, 8),)),
    "transposed": (transposed, (IMAGE,)),
    "conv1d": (conv1d, ((2, 3, 10),)),
    "two_inputs": (two_inputs, ((2, 8), (2, 3))),
    "shared": (shared, (IMAGE,)),
    "prelu": (prelu, (IMAGE,)),
    "chunked": (chunked, ((2, 8),)),
    "grouped": (grouped, (IMAGE,)),
    "functional_call": (functional_call, (IMAGE,)),
    "flipped": (flipped, ((2, 8),)),
}
"""Models that lose half of their MACs: name to (builder, shapes of the inputs)."""


def make(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of `PRUNABLE` in evaluation mode with example inputs, both random.

    Batch-norms get statistics and weights as training leaves them, not zeros and ones.
    """
    builder, shapes = PRUNABLE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = lived_in(builder()).to(dtype).eval()
        return model, tuple(torch.randn(shape).to(dtype) for shape in shapes)


def lived_in(model: nn.Module) -> nn.Module:
    """Give every normalization random statistics and weights; returns the model."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
            if name.endswith(("weight", "running_var")):
                tensor.data.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                tensor.data.normal_(0.0, 0.3)
    return model


def zeroed(model: nn.Module, kept: dict[str, dict[int, list[int]]]) -> nn.Module:
    """A copy with everything set to zero by hand that is not kept."""
    twin = copy.deepcopy(model)
    state = twin.state_dict(keep_vars=True)
    for name, dims in kept.items():
        for dim, positions in dims.items():
            gone = [i for i in range(state[name].shape[dim]) if i not in set(positions)]
            state[name].data.index_fill_(dim, torch.tensor(gone), 0.0)
    return twin
