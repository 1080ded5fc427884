"""Small networks of the kinds that backends meet: convolutions, residuals, attention, detection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE = (3, 16, 16)
SEQUENCE = (6, 16)


class Convolutional(nn.Module):
    """Image to classes: convolutions with batch-norm, a depthwise one, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 16, 16) -> (n, 10)
        """Logits."""
        x = functional.relu(self.stem_norm(self.stem(x)))
        x = functional.max_pool2d(x, 2)
        x = functional.relu6(self.pointwise(functional.relu(self.depthwise(x))))
        return self.head(functional.max_pool2d(x, 2).flatten(1))


class Residual(nn.Module):
    """Image to classes by way of a stream that two branches are added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 8, 3, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(8)
        self.up = nn.Conv2d(8, 16, 1, bias=False)
        self.up_norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 16, 16) -> (n, 10)
        """Logits."""
        x = functional.relu(self.stem(x))
        branch = functional.relu(self.down_norm(self.down(x)))
        x = functional.relu(x + self.up_norm(self.up(branch)))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """Sequence to classes: one transformer block with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 32)
        self.narrow = nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 6, 16) -> (n, 10)
        """Logits."""
        q, k, v = (
            part.reshape(-1, 6, 2, 8).transpose(1, 2)  # (n, heads, tokens, 8)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(-1, 6, 16))
        x = x + self.narrow(functional.gelu(self.wide(x)))
        return self.head(x.mean(1))


class Detection(nn.Module):
    """Image to boxes and scores at two scales, with upsampling and concatenation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 3, padding=1)
        self.coarse = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.lateral = nn.Conv2d(24, 8, 1)
        self.boxes = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(16, 4, 1)])
        self.scores = nn.ModuleList([nn.Conv2d(8, 3, 1), nn.Conv2d(16, 3, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # -> (n, 320, 4), (n, 320, 3)
        """Boxes and the logits of their classes, of all positions."""
        fine = functional.silu(self.fine(x))
        coarse = functional.silu(self.coarse(fine))
        up = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        fine = functional.silu(self.lateral(torch.cat([fine, up], 1)))
        heads = []
        for head in (self.boxes, self.scores):
            maps = [layer(level) for layer, level in zip(head, (fine, coarse), strict=True)]
            heads.append(torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1))
        return heads[0], heads[1]


class Sorting(nn.Module):
    """Ends in operations that few runtimes have, for `Backend.check` to accept or to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 16, 16) -> (n, 8, 4)
        """The largest values of each channel, summed up one by one."""
        return self.layer(x).flatten(2).sort(-1, descending=True).values[..., :4].cumsum(-1)


class Fourier(nn.Module):
    """Computes with complex numbers, for `Backend.check` to accept or to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 16, 16) -> (n, 8, 14, 8)
        """Magnitudes of the spectrum."""
        return torch.fft.rfft(self.layer(x)).abs()


class Pair(nn.Module):
    """Two images of one shape, which nothing but their order tells apart, to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # 2 of (n, 3, 16, 16) -> (n, 10)
        """Logits."""
        both = functional.relu(self.left(x) + self.right(y))
        return self.head(functional.adaptive_avg_pool2d(both, 1).flatten(1))


class Tokens(nn.Module):
    """Whole numbers to classes by way of an embedding, with a mask of what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # 2 of (n, 6) int64 -> (n, 10)
        """Logits."""
        counts = mask[..., None].to(torch.float32)
        x = functional.relu(self.layer(self.embedding(ids))) * counts
        return self.head(x.sum(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (Convolutional, IMAGE),
    "residual": (Residual, IMAGE),
    "attention": (Attention, SEQUENCE),
    "detection": (Detection, IMAGE),
}
"""What every backend should run: name to the network and the shape of one sample."""

UNUSUAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sorting": (Sorting, IMAGE),
    "fourier": (Fourier, IMAGE),
}
"""What a backend may refuse."""


def several(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with several inputs in evaluation mode, and one sample of each.

    Args:
        name: ``pair``, or ``tokens``, whose inputs are whole numbers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "pair":
            return Pair().eval(), (torch.randn(1, *IMAGE), torch.randn(1, *IMAGE))
        ids = torch.randint(40, (1, 6))
        return Tokens().eval(), (ids, (torch.arange(6) < 4).long()[None])


def made(name: str, samples: int = 1) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode with the statistics of a trained one, and inputs for it."""
    network, shape = {**NETWORKS, **UNUSUAL}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
        return model, torch.randn(samples, *shape)
