"""What criteria ask of data beside gradients: norms of inputs, and what channels put out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.batches import Inputs, first_sample, inputs_of
from slimkit.calls import WEIGHTED, Call, CallMode, trace
from slimkit.errors import PruningError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Activation
from slimkit.progress import track

MEASURED = frozenset({"input_norm", "activation"})
"""Fields of `slimkit.interfaces.Layer` that a forward without labels fills."""

_BEHIND = frozenset(
    {"batch_norm", "relu", "relu6", "hardtanh", "clamp", "leaky_relu", "prelu", "elu", "celu"}
    | {"selu", "silu", "gelu", "mish", "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus"}
    | {"dropout", "dropout2d"}
)
"""What belongs to the layer in front of it, where nobody else reads that layer's output."""


@dataclass
class Measured:
    """Sums over the data so far for one weight, which several calls may share.

    Args:
        squares: of each input feature, shape (in,).
        sizes: sums of absolute outputs, shape (out,).
        zeros: how many outputs were zero or below, shape (out,).
        values: how many outputs each channel had.
    """

    squares: Tensor | None = None
    sizes: Tensor | None = None
    zeros: Tensor | None = None
    values: int = 0

    def add_input(self, x: Tensor, axis: int) -> None:
        """Count what a layer reads, whose features lie along `axis`."""
        found = x.detach().double().square().sum([d for d in range(x.dim()) if d != axis])
        self.squares = found if self.squares is None else self.squares + found

    def add_output(self, y: Tensor, axis: int) -> None:
        """Count what a layer puts out, whose channels lie along `axis`."""
        others = [d for d in range(y.dim()) if d != axis]
        sizes = y.detach().double().abs().sum(others)
        zeros = (y.detach() <= 0).double().sum(others)
        self.sizes = sizes if self.sizes is None else self.sizes + sizes
        self.zeros = zeros if self.zeros is None else self.zeros + zeros
        self.values += y.numel() // y.shape[axis]

    @property
    def activation(self) -> Activation | None:
        """Means over the data."""
        if self.sizes is None or self.zeros is None:
            return None
        return Activation((self.sizes / self.values).float(), (self.zeros / self.values).float())

    def input_norm(self, weight: Tensor) -> Tensor | None:
        """Of the features that each position of a weight (out, in / groups, ...) reads."""
        if self.squares is None:
            return None
        norm = self.squares.sqrt().to(weight.dtype)
        tail = [1] * (weight.dim() - 2)
        if len(norm) == weight.shape[1]:
            return norm.reshape(1, -1, *tail)
        rows = norm.reshape(-1, weight.shape[1])  # of one group each
        return rows.repeat_interleave(weight.shape[0] // len(rows), 0).reshape(
            *weight.shape[:2], *tail
        )


class _Watch(CallMode):
    """Adds up what passes some calls.

    Args:
        model: what runs.
        inputs: call to the weight whose inputs it reads.
        outputs: call to the weight whose outputs it puts out, and whether they lie in its last
            dimension.
    """

    def __init__(
        self, model: nn.Module, inputs: dict[str, str], outputs: dict[str, tuple[str, bool]]
    ) -> None:
        super().__init__(model)
        self.inputs = inputs
        self.outputs = outputs
        self.found: dict[str, Measured] = {}

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute, and count."""
        y = func(*args, **kwargs)
        if name in self.inputs:
            x = args[0] if args else kwargs["input"]
            self._of(self.inputs[name]).add_input(x, _axis(x, op == "linear"))
        if name in self.outputs:
            weight, last = self.outputs[name]
            self._of(weight).add_output(y, _axis(y, last))
        return y

    def _of(self, weight: str) -> Measured:
        return self.found.setdefault(weight, Measured())


def _axis(x: Tensor, last: bool) -> int:
    """Where the channels of a linear layer or of a convolution lie."""
    return x.dim() - 1 if last else 1


@torch.no_grad()
def measure(
    model: nn.Module, batches: Iterable[Any], count: int, inputs: Inputs = inputs_of
) -> dict[str, Measured]:
    """What passes each layer with weights, by the weight's path, over `count` batches.

    The model runs in evaluation mode and is not changed. A batch of a convolution has samples in
    front, as in training.

    Raises:
        PruningError: there is no batch.
    """
    watch: _Watch | None = None
    for batch in track(islice(batches, count), "measuring activations", count):
        given = inputs(batch, model)
        if watch is None:
            watch = _watch(model, first_sample(given))
        with evaluating(model), watch:
            model(*given)
    if watch is None:
        raise PruningError("the criterion needs activations, but the data gave no batch")
    return watch.found


def _watch(model: nn.Module, inputs: tuple[Any, ...]) -> _Watch:
    traced = trace(model, inputs)
    readers = traced.readers()
    reading: dict[str, str] = {}
    making: dict[str, tuple[str, bool]] = {}

    def end(call: Call) -> Call:
        """The last call of those that belong to `call`."""
        while True:
            behind = readers.get(call.outputs[0], [])
            if len(behind) != 1 or behind[0].op not in _BEHIND:
                return call
            call = behind[0]

    for call in traced.calls:
        if call.op in WEIGHTED and call.weight_path is not None:
            reading[call.name] = call.weight_path
            making[end(call).name] = call.weight_path, call.op == "linear"
    return _Watch(model, reading, making)
