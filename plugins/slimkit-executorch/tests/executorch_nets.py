"""Small networks of what XNNPACK has for integers, for floats only, and not at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mixed(nn.Module):
    """Residuals, concatenation, pooling of both kinds, a depthwise layer, ReLU6 and hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.side = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)
        self.both, self.gate = nn.Conv2d(24, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 24, 24) -> (n, 10)
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(x + self.point(functional.relu6(self.deep(x))))
        x = functional.max_pool2d(x, 2)
        x = functional.hardswish(self.both(torch.cat([x, functional.relu(self.side(x))], 1)))
        x = functional.avg_pool2d(x, 2)
        x = x * torch.sigmoid(self.gate(functional.adaptive_avg_pool2d(x, 1)))
        return self.head(x.mean((2, 3)))


class Padded(nn.Module):
    """Pads on two sides only, as TensorFlow does, and for a function of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 3, 2, groups=16)
        self.wide, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, 10)
        x = functional.relu6(self.stem(functional.pad(x, (0, 1, 0, 1))))
        x = functional.relu6(self.deep(functional.pad(x, (0, 1, 0, 1))))
        x = functional.relu6(self.wide(x))
        return self.head(functional.silu(functional.pad(x, (1, 0, 1, 0))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:  # (n, 12, 32) -> the same
        qkv = self.qkv(self.norm(x)).reshape(-1, 12, 3, 4, 8).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(-1, 12, 32))


class Shuffle(nn.Module):
    """Takes channels apart and together again, and convolves over one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.line = nn.Conv2d(16, 16, 3, 2), nn.Conv1d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:  # (n, 16, 12, 12) -> (n, 16)
        x = functional.relu(self.a(x))
        x = torch.cat([x, functional.relu(self.b(x))], 1)
        x = x.view(-1, 2, 16, 12, 12).transpose(1, 2).reshape(-1, 32, 12, 12)
        left, right = x.chunk(2, 1)
        return functional.relu(self.line((self.c(left)).flatten(2))).mean(2) + right.mean((2, 3))


class Leaves(nn.Module):
    """Ends in layers of four kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.whole = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3)
        self.deep, self.grouped = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 3, groups=2)
        self.line = nn.Conv1d(16, 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (n, 16, 12, 12)
        x = functional.relu(self.stem(x))
        return self.whole(x), self.deep(x), self.grouped(x), self.line(x.flatten(2))


class Functions(nn.Module):
    """Functions of rounded values, of two tensors, and one that XNNPACK lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.c, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:  # (n, 8, 8, 8) -> (n, 8, 16, 16)
        x = self.b(functional.hardswish(self.a(x)))
        x = self.c(functional.gelu(x)) + functional.elu(x)
        x = torch.tanh(self.up(functional.leaky_relu(x)))
        x = functional.silu(x) / (1 + x.abs()) - functional.hardswish(x)
        x = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
        return functional.softmax(x.exp().sqrt(), -1)


class Ghost(nn.Module):
    """GhostNet's ways: activations in place, joined halves of which a part is taken, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 10, 1)
        self.cheap = nn.Conv2d(10, 10, 3, 1, 1, groups=10)
        self.squeeze, self.gate = nn.Conv2d(18, 8, 1), nn.Conv2d(8, 18, 1)
        self.second, self.third = nn.Conv2d(18, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 16, 16) -> (n, 8, 8, 8)
        x = functional.relu_(self.stem(x))
        y = functional.relu_(self.first(x))
        y = torch.cat([y, functional.relu6(self.cheap(y), inplace=True)], 1)[:, :18, :, :]
        z = functional.relu_(self.squeeze(y.mean((2, 3), keepdim=True)))
        y = y * functional.hardsigmoid(self.gate(z))
        y = functional.hardtanh_(self.second(y), 0.0, 1.0)[:, :, :, :]
        return self.third(y)


class Overwriting(nn.Module):
    """Overwrites views and what is read again; and sums and activations that nobody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:  # (n, 8, 6, 6) -> the same
        x = self.a(x)
        y = functional.relu_(self.drop(x))  # the same memory: x is clipped as well
        y = self.b(y) + x
        left, _ = y.chunk(2, 1)
        functional.relu_(left)  # half of y
        z = self.a(y)
        z += y
        flat = functional.relu_(z).flatten(2)
        functional.hardtanh_(flat, 0.0, 0.5)  # z, too
        return flat.reshape(z.shape) + z


class Unknown(nn.Module):
    """Asks for two operations that ExecuTorch has no kernel for."""

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 3)
        return torch.linalg.cholesky_ex(x)[0] + torch.special.i0e(x)
