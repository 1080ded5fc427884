"""Counts what a model costs: multiply-accumulates, parameters and MiB."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from slimkit.batches import fresh
from slimkit.calls import WEIGHTED, CallMode
from slimkit.copies import copied
from slimkit.evaluating import without_fast_paths
from slimkit.pruning.counting import Removed
from slimkit.pruning.rules_recurrent import GATES

MIB = 2**20


def macs(model: nn.Module, example_inputs: tuple[Any, ...]) -> int:
    """Multiply-accumulates of one forward on `example_inputs`, as PyTorch's own counter has it.

    Convolutions, linear layers and matrix products count; additions and activations do not.
    `model` is not changed.
    """
    return counted(copied(model, share=True), example_inputs)


@torch.no_grad()
def counted(model: nn.Module, example_inputs: tuple[Any, ...]) -> int:
    """`macs` of a model of one's own: it is left in evaluation mode, and its parameters frozen."""
    with without_fast_paths(), _counter() as counter:
        _ready_to_count(model)(*fresh(example_inputs))
    return int(counter.get_total_flops()) // 2


def _ready_to_count(model: nn.Module) -> nn.Module:
    """Evaluation mode and nothing trainable: the counter's hooks fail on a parameter's views."""
    return model.eval().requires_grad_(False)


def _counter() -> FlopCounterMode:
    """PyTorch's own, which misses recurrent layers that oneDNN or cuDNN computes whole."""
    whole = {
        torch.ops.aten.mkldnn_rnn_layer: lambda x, *args, **_: _recurrent(x, args[:2]),
        torch.ops.aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent(x, weights),
    }
    return FlopCounterMode(display=False, custom_mapping=whole)


def _recurrent(x: Sequence[int], weights: Iterable[Sequence[int]]) -> int:
    """Additions and multiplications of each matrix on each step, from the shapes."""
    matrices = sum(math.prod(weight) for weight in weights if len(weight) == 2)
    return 2 * math.prod(x[:-1]) * matrices


def parameters(model: nn.Module) -> int:
    """How many parameters `model` has; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def size_mb(model: nn.Module) -> float:
    """MiB of all parameters and buffers in their dtypes, as a safetensors file holds them.

    Tied tensors count once; buffers that are not saved, and the file's header, do not count.
    """
    return sum(t.numel() * t.element_size() for t in _stored(model).values()) / MIB


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """What the state dict holds, tied tensors under their first name.

    A module may save less or other things; these are all that it computes with.
    """
    first: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        kept = {n: b for n, b in module._buffers.items() if n not in passing}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                first.setdefault(id(tensor), (f"{path}.{name}" if path else name, tensor))
    return dict(first.values())


PRODUCTS = ("addmm", "matmul", "mm")
"""Operations whose last two arguments are multiplied as matrices."""


class _Uses(CallMode):
    """Counts how often a forward uses one weight of each parameter.

    Args:
        model: runs inside.
        flops: counts in the same forward.
    """

    def __init__(self, model: nn.Module, flops: FlopCounterMode) -> None:
        super().__init__(model)
        self.flops = flops
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.uses: dict[str, float] = {}
        # what is computed of parameters and buffers alone, and of which
        self._made_of: dict[int, frozenset[str]] = {id(b): frozenset() for b in model.buffers()}
        self._made_of |= {number: frozenset([name]) for number, name in self.names.items()}
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before, known = self.flops.get_total_flops(), dict(self.uses)
        out = func(*args, **kwargs)
        self._count(name, op, args, kwargs, out)
        macs = (self.flops.get_total_flops() - before) // 2
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if macs and self.uses == known:
            self._count_made(given, macs)
        if all(id(tensor) in self._made_of for tensor in given):
            names = frozenset[str]().union(*(self._made_of[id(tensor)] for tensor in given))
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and id(tensor) not in self._made_of:
                    self._made_of[id(tensor)] = names
                    self._alive.append(tensor)
        return out

    def _count_made(self, given: Iterable[Tensor], macs: int) -> None:
        """A product with what is computed of one weight alone uses that weight's values alike."""
        made = [self._made_of[id(t)] for t in given if id(t) in self._made_of and t.dim() > 1]
        names = {name for each in made for name in each if len(self.shapes[name]) > 1}
        if len(names) == 1 and len(made) == 1:
            (weight,) = names
            count = macs / math.prod(self.shapes[weight])
            self.uses[weight] = self.uses.get(weight, 0.0) + count

    def _count(self, name: str, op: str, args: Any, kwargs: Any, out: Any) -> None:
        """What a known operation uses of its weights."""
        if op in PRODUCTS and len(args) >= 2:
            self._count_product(out, *args[-2:])
            return
        if op.removesuffix("_cell") in GATES:
            self._count_steps(op, args)
            return
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        if op not in WEIGHTED:
            return
        # a weight that is computed in the forward (standardized, say) stands for the layer's own
        own = name.partition(":")[0].replace("/", ".") + ".weight"
        weight = self.names.get(id(given["weight"]), own.lstrip("."))
        if self.shapes.get(weight) == given["weight"].shape:
            # a transposed convolution spreads each input position, the others gather each output
            positions = given["input"] if "transpose" in op else out
            channels = positions.shape[-1 if op == "linear" else -1 - int(op[-2])]
            self.uses[weight] = self.uses.get(weight, 0.0) + positions.numel() / channels

    def _count_steps(self, op: str, args: Any) -> None:
        """A recurrent layer's matrices, which come behind its state; packed data, in four parts."""
        # packed sequences have their states third, which LSTMs give as a tuple
        lists = [a for a in args[2:4] if isinstance(a, list | tuple)]
        own = args[2:] if "_cell" in op else next(iter(lists[::-1]), ())
        steps = args[0].numel() / args[0].shape[-1]
        for matrix in own:
            weight = self.names.get(id(matrix))
            if weight is not None and matrix.dim() == 2:
                self.uses[weight] = self.uses.get(weight, 0.0) + steps

    def _count_product(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """A parameter of two dimensions costs its weights once for each row of the other side."""
        for factor, own in ((left, 0), (right, 1)):
            weight = self.names.get(id(factor))
            if weight is not None and factor.dim() == 2:
                rows = out.numel() / factor.shape[own]
                self.uses[weight] = self.uses.get(weight, 0.0) + rows


@dataclass(frozen=True)
class CostModel:
    """Predicts the cost of a cut without cutting: exact for convolutions and linear layers.

    Args:
        macs_per_weight: how often one weight of each tensor is used in a forward.
        shapes: shape of each parameter.
        measured_macs: what PyTorch's counter counts in the same forward.
        stored: shape of each tensor that a file holds, and bytes of one of its values.
    """

    macs_per_weight: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    measured_macs: int
    stored: dict[str, tuple[tuple[int, ...], int]]

    @cached_property
    def fixed_macs(self) -> int:
        """Multiply-accumulates that belong to no weight (attention)."""
        known = sum(n * math.prod(self.shapes[name]) for name, n in self.macs_per_weight.items())
        return max(0, round(self.measured_macs - known))

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, example_inputs: tuple[Any, ...]) -> CostModel:
        """Measure `model` once."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        probe = _ready_to_count(copied(model, share=True))
        flops = _counter()
        uses = _Uses(probe, flops)
        with without_fast_paths(), flops, uses:
            probe(*fresh(example_inputs))
        stored = {n: (tuple(t.shape), t.element_size()) for n, t in _stored(model).items()}
        return cls(uses.uses, shapes, int(flops.get_total_flops()) // 2, stored)

    def predict(self, removed: Removed) -> tuple[float, float]:
        """MACs and parameters of the model without the positions that are `removed`."""
        total_macs, total_parameters = float(self.fixed_macs), 0.0
        for name, shape in self.shapes.items():
            numel = _numel(shape, removed.get(name, {}))
            total_parameters += numel
            total_macs += self.macs_per_weight.get(name, 0.0) * numel
        return total_macs, total_parameters

    def share(self, name: str, removed: Mapping[int, int]) -> tuple[float, float]:
        """MACs and parameters of one parameter without so many positions of its dimensions."""
        numel = _numel(self.shapes[name], removed)
        return self.macs_per_weight.get(name, 0.0) * numel, float(numel)

    def predict_size_mb(self, removed: Removed) -> float:
        """MiB of the model without what is `removed`, as `size_mb` counts them."""
        left = (
            _numel(s, removed.get(name, {})) * width for name, (s, width) in self.stored.items()
        )
        return sum(left) / MIB


def _numel(shape: tuple[int, ...], removed: Mapping[int, int]) -> int:
    """How many values are left of a tensor."""
    return math.prod(size - removed.get(d, 0) for d, size in enumerate(shape))
