"""Counts what a model costs: multiply-accumulates and parameters."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimkit.calls import WEIGHTED, trace
from slimkit.pruning.removal import Kept


@torch.no_grad()
def macs(model: nn.Module, example_inputs: tuple[Any, ...]) -> int:
    """Multiply-accumulates of one forward on `example_inputs`, as PyTorch's own counter has it.

    Convolutions, linear layers and matrix products count; additions and activations do not.
    """
    probe = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter:
        probe(*example_inputs)
    return int(counter.get_total_flops()) // 2


def parameters(model: nn.Module) -> int:
    """How many parameters `model` has; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


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
    def of(cls, model: nn.Module, example_inputs: tuple[Any, ...]) -> CostModel:
        """Measure `model` once."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        uses: dict[str, float] = {}
        for call in trace(model, example_inputs).calls:
            weight = call.state.get(1, call.state.get("weight", ""))
            if call.op in WEIGHTED and weight in shapes:
                channels = call.shape[-1] if call.op == "linear" else call.shape[1]
                uses[weight] = uses.get(weight, 0.0) + math.prod(call.shape) / channels
        total = macs(model, example_inputs)
        known = sum(n * math.prod(shapes[name]) for name, n in uses.items())
        return cls(uses, shapes, max(0, round(total - known)))

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
