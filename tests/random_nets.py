"""Random small networks, and an own account of what zeroing a channel means in them."""

from __future__ import annotations

import random

import torch
from models import conv, lived_in, pooled
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """One step of a `RandomNet`: reads one or two earlier tensors of equal size."""

    def __init__(self, kind: str, channels: list[int], rng: random.Random) -> None:
        super().__init__()
        self.kind = kind
        c = channels[0]
        self.out = c
        if kind in ("conv", "grouped"):
            groups = 2 if kind == "grouped" and c % 2 == 0 else 1
            self.out = rng.choice([4, 6, 8])
            self.conv = conv(
                c, self.out, rng.choice([1, 3]), groups=groups, bias=rng.random() < 0.5
            )
            self.norm = nn.BatchNorm2d(self.out) if rng.random() < 0.6 else nn.Identity()
        elif kind == "depthwise":
            self.out = c * rng.choice([1, 2])
            self.conv = conv(c, self.out, groups=c)
            self.norm = nn.BatchNorm2d(self.out)
        elif kind == "residual":
            self.conv, self.norm = conv(c, c), nn.BatchNorm2d(c)
        elif kind == "scale":
            self.scale = nn.Parameter(torch.rand(c, 1, 1) + 0.5)
        elif kind == "excite":
            self.down, self.up = nn.Linear(c, 3), nn.Linear(3, c)
        elif kind == "join":  # to the same width, then added
            self.conv = conv(channels[1], c, 1)
        elif kind == "cat":
            self.out = sum(channels)
        elif kind == "chunk":
            self.out = c // 2
        elif kind == "bottleneck":
            self.inner, self.outer = conv(c, 6, 1), conv(6, c, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind in ("conv", "grouped", "depthwise"):
            return functional.relu(self.norm(self.conv(x)))
        if self.kind == "residual":
            return functional.relu(x + self.norm(self.conv(x)))
        if self.kind == "scale":
            return x * self.scale
        if self.kind == "excite":
            gate = torch.sigmoid(self.up(functional.relu(self.down(pooled(x)))))
            return x * gate[:, :, None, None]
        if self.kind == "join":
            return x + self.conv(y)
        if self.kind == "cat":
            return torch.cat([x, y], 1)
        if self.kind == "chunk":
            left, right = x.chunk(2, 1)
            return left + functional.relu(right)
        if self.kind == "bottleneck":
            return x - self.outer(functional.relu(self.inner(x)))
        return functional.avg_pool2d(x, 3, 1, 1)


KINDS = ("conv", "conv", "grouped", "depthwise", "residual", "scale", "excite", "join", "cat")
KINDS += ("chunk", "bottleneck", "pool")


class RandomNet(nn.Module):
    """A stem, a few random blocks that each read earlier ones, and a classifier."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.stem = conv(3, 8)
        self.blocks = nn.ModuleList()
        self.sources: list[tuple[int, int]] = []
        widths = [8]
        for _ in range(rng.randint(2, 7)):
            a = rng.randrange(max(0, len(widths) - 2), len(widths))
            b = rng.randrange(len(widths))
            kind = rng.choice(KINDS)
            if kind == "chunk" and widths[a] % 2 or widths[a] > 24:
                kind = "conv"
            self.blocks.append(Block(kind, [widths[a], widths[b]], rng))
            self.sources.append((a, b))
            widths.append(self.blocks[-1].out)
        self.flat = rng.random() < 0.3
        self.head = nn.Linear(widths[-1] * (16 if self.flat else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [functional.relu(self.stem(x))]
        for block, (a, b) in zip(self.blocks, self.sources, strict=True):
            seen.append(block(seen[a], seen[b]))
        return self.head(seen[-1].flatten(1) if self.flat else pooled(seen[-1]))


def random_net(seed: int) -> nn.Module:
    """The network of a seed in evaluation mode, with weights as training leaves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return lived_in(RandomNet(seed)).eval()


def zeroed_where_made(model: nn.Module, x: Tensor, kept: dict[str, dict[int, list[int]]]) -> Tensor:
    """The output of `model` with the channels that were removed from each layer set to zero.

    Works on activations: what a layer, or a norm behind it, puts out is zeroed in the positions
    that its own weight or bias lost.
    """
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            positions = kept.get(f"{name}.weight", {}).get(0)
            if positions is not None:
                size = layer.weight.shape[0]
                mask = torch.zeros(size).index_fill_(0, torch.tensor(positions), 1.0)
                handles.append(layer.register_forward_hook(_silencer(mask)))
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


def _silencer(mask: Tensor):
    def hook(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        return out * (mask if out.dim() == 2 else mask[:, None, None])

    return hook
