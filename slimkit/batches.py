"""Takes the model's inputs out of a batch, with or without labels beside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slimkit.calls import map_tensors
from slimkit.errors import SlimkitError

Inputs = Callable[[Any, nn.Module], tuple[Any, ...]]
"""Takes the positional arguments of a model out of a batch."""


def inputs_of(batch: Any, model: nn.Module | None = None) -> tuple[Any, ...]:
    """The positional arguments of `model` in `batch`, moved to the model's device.

    A tensor is the input; of a tuple or list the first element is (itself a tensor, or a tuple of
    several inputs), the rest are labels; where the model's forward demands n > 1 arguments, the
    first n elements are. A mapping is passed whole.

    Raises:
        SlimkitError: the batch is something else, or holds no tensor.
    """
    first = batch
    if isinstance(batch, list | tuple) and batch:
        demanded = _demanded(model) if isinstance(batch[0], Tensor) else 1
        first = batch[:demanded] if 1 < demanded <= len(batch) else batch[0]
    inputs: tuple[Any, ...]
    if isinstance(first, Tensor | Mapping):
        inputs = (first,)
    elif isinstance(first, list | tuple) and first:
        inputs = tuple(first)
    else:
        raise SlimkitError(
            f"a batch must be a tensor, (inputs, labels) or a dict of tensors, "
            f"not {type(batch).__name__}"
        )
    parameter = next(model.parameters(), None) if model is not None else None
    if parameter is None:
        return inputs
    return tuple(map_tensors(lambda t: beside(t, parameter), x) for x in inputs)


def beside(t: Tensor, parameter: Tensor) -> Tensor:
    """`t` on the parameter's device; of its precision where both are floating-point."""
    if t.is_floating_point() and parameter.is_floating_point():
        return t.to(parameter.device, parameter.dtype)
    return t.to(parameter.device)


LABELS = ("labels", "label", "targets", "target", "y")
"""What batches and forwards call them."""


def labels_of(batch: Any) -> Tensor:
    """The labels in a batch: the second element of (inputs, labels), or what a dict calls so.

    Raises:
        SlimkitError: there are none, or they are no tensor.
    """
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise SlimkitError(
            "labels are needed: a batch must be (inputs, labels) with a tensor of labels, or a "
            f"dict with one under {', '.join(LABELS)}"
        )
    return found


def _demanded(model: nn.Module | None) -> int:
    """How many positional arguments the forward cannot do without."""
    if model is None:
        return 1
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """A tuple of positional arguments from a tensor or a tuple.

    Raises:
        SlimkitError: it is neither.
    """
    if isinstance(example_inputs, Tensor | Mapping):
        return (example_inputs,)
    if isinstance(example_inputs, list | tuple) and example_inputs:
        return tuple(example_inputs)
    raise SlimkitError(
        f"example_inputs must be a tensor or a tuple of them, not {type(example_inputs).__name__}"
    )


def fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs in lists, dicts and memory of their own."""
    return tuple(map_tensors(lambda t: t.detach().clone(), x) for x in inputs)


def first_sample(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs with a batch of one, as a device sees them."""
    return tuple(map_tensors(lambda t: t[:1].clone() if t.dim() else t, x) for x in inputs)


def samples_of(inputs: tuple[Any, ...], start: int, end: int) -> tuple[Any, ...]:
    """The inputs of some samples of a batch; what has no batch dimension stays."""
    return tuple(map_tensors(lambda t: t[start:end] if t.dim() else t, x) for x in inputs)


def samples_in(batch: Any) -> int:
    """How many samples a batch with its labels holds: the length of its first tensor."""
    return next((t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 1)


def sample_of(batch: Any, n: int, size: int) -> Any:
    """The n-th sample of a batch, as a batch of one; what is not `size` long stays."""
    return map_tensors(lambda t: t[n : n + 1] if t.dim() and len(t) == size else t, batch)


def joined(batches: Sequence[Any]) -> Any:
    """Several batches, or outputs of several samples, as one.

    What has no batch dimension is the first's.

    Raises:
        RuntimeError, TypeError, ValueError: they are of different shapes or structures.
    """

    def join(*values: Any) -> Any:
        batched = isinstance(values[0], Tensor) and values[0].dim()
        return torch.cat(values) if batched else values[0]

    return tree_map(join, *batches)


def doubled(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs twice in one batch, for what cannot be computed of one sample alone."""
    return tuple(map_tensors(lambda t: torch.cat([t, t]) if t.dim() else t, x) for x in inputs)


def to_cpu(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs on the CPU, detached."""
    return tuple(map_tensors(lambda t: t.detach().cpu(), x) for x in inputs)


def finite(inputs: tuple[Any, ...]) -> bool:
    """Whether every floating-point tensor in `inputs` is free of NaN and infinity."""
    bad: list[Tensor] = []

    def look(t: Tensor) -> Tensor:
        if t.is_floating_point() and not torch.isfinite(t).all():
            bad.append(t)
        return t

    for x in inputs:
        map_tensors(look, x)
    return not bad
