"""Counts what a model costs: multiply-accumulates and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimkit.calls import WEIGHTED, CallMode
from slimkit.copies import copied
from slimkit.pruning.removal import Kept


@torch.no_grad()
def macs(model: nn.Module, example_inputs: tuple[Any, ...]) -> int:
    """Multiply-accumulates of one forward on `example_inputs`, as PyTorch's own counter has it.

    Convolutions, linear layers and matrix products count; additions and activations do not.
    """
    probe = copied(model, share=True).eval()
    with FlopCounterMode(display=False) as counter:
        probe(*example_inputs)
    return int(counter.get_total_flops()) // 2


def parameters(model: nn.Module) -> int:
    """How many parameters `model` has; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


class _Uses(CallMode):
    """Counts how often a forward uses one weight of each parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.uses: dict[str, float] = {}

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        if op not in WEIGHTED:
            return out
        # a weight that is computed in the forward (standardized, say) stands for the layer's own
        own = name.partition(":")[0].replace("/", ".") + ".weight"
        weight = self.names.get(id(given["weight"]), own.lstrip("."))
        if self.shapes.get(weight) == given["weight"].shape:
            # a transposed convolution spreads each input position, the others gather each output
            positions = given["input"] if "transpose" in op else out
            channels = positions.shape[-1 if op == "linear" else -1 - int(op[-2])]
            self.uses[weight] = self.uses.get(weight, 0.0) + positions.numel() / channels
        return out


@dataclass(frozen=True)
class CostModel:
    """Predicts the cost of a cut without cutting: exact for convolutions and linear layers.

    Args:
        macs_per_weight: how often one weight of each tensor is used in a forward.
        shapes: shape of each parameter.
        fixed_macs: multiply-accumulates that belong to no weight (attention).
    """

    macs_per_weight: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    fixed_macs: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, example_inputs: tuple[Any, ...]) -> CostModel:
        """Measure `model` once."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        probe = copied(model, share=True).eval()
        counter = _Uses(probe)
        with counter:
            probe(*example_inputs)
        total = macs(model, example_inputs)
        known = sum(n * math.prod(shapes[name]) for name, n in counter.uses.items())
        return cls(counter.uses, shapes, max(0, round(total - known)))

    def predict(self, kept: Kept) -> tuple[float, float]:
        """MACs and parameters of the model cut down to `kept`."""
        total_macs, total_parameters = float(self.fixed_macs), 0.0
        for name, shape in self.shapes.items():
            sizes = list(shape)
            for dim, positions in kept.get(name, {}).items():
                sizes[dim] = len(positions)
            numel = math.prod(sizes)
            total_parameters += numel
            total_macs += self.macs_per_weight.get(name, 0.0) * numel
        return total_macs, total_parameters
