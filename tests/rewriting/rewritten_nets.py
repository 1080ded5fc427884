"""Small models, one for each thing that a rewrite looks for, and the functions to compare with."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def hardswish(x: Tensor) -> Tensor:
    """From its formula."""
    return x * (x + 3).clamp(0, 6) / 6


def hardsigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Slices(nn.Module):
    """A focus stem as YOLOv5 wrote it: four slices, a convolution, batch-norm, SiLU."""

    def __init__(self, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 6, kernel, stride, kernel // 2)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return functional.silu(self.bn(self.conv(torch.cat(parts, 1))))


class Reshapes(nn.Module):
    """Space to depth by views and a permutation, three by three, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(27, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 3, 3, w // 3, 3).permute(0, 3, 5, 1, 2, 4)
        return self.conv(x.reshape(n, 9 * c, h // 3, w // 3))


class Gates(nn.Module):
    """Sigmoid and SiLU in each way in which people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU(inplace=True)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x * 2)
        x = functional.silu(x + 1)
        x = x * torch.sigmoid(x)
        y = x * 1.5
        y = y.mul_(y.sigmoid())
        return y * self.gate(x)


def gates_by_hand(x: Tensor, silu, sigmoid) -> Tensor:
    x = silu(x * 2)
    x = silu(x + 1)
    x = silu(x)
    y = silu(x * 1.5)
    return y * sigmoid(x)


class Drops(nn.Module):
    """Dropout and identities inside a Sequential, beside one, and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 8), nn.Dropout(0.5), nn.Identity(), nn.Linear(8, 8), nn.ReLU(inplace=True)
        )
        self.drop = nn.Dropout(0.3)
        self.hook = nn.Identity()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook(self.drop(self.body(x)))
        return self.head(functional.dropout(x, 0.2, training=self.training))


def sixes(act: type[nn.Module] = nn.SiLU) -> nn.Module:
    """Convolutions of 6 and 10 channels with batch-norm, one of them depthwise."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        act(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.BatchNorm2d(6),
        act(),
        nn.Conv2d(6, 10, 1),
        act(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(160, 5),
    )


class Stream(nn.Module):
    """A residual stream of 6 channels, beside 5 others behind a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.side = nn.Conv2d(3, 5, 1)
        self.last = nn.Conv2d(11, 7, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.stem(x))
        y = y + torch.sigmoid(self.body(y))
        y = self.last(torch.cat([self.side(x), y], 1))
        return self.head(y.mean((2, 3)))


def alive(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with batch-norm statistics that matter."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return model.eval()
