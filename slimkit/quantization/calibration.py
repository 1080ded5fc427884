"""`quantize`: finds activation ranges on real data and returns a model that simulates int8."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from slimkit.batches import finite, inputs_of
from slimkit.copies import copied
from slimkit.errors import QuantizationError, SlimkitError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Backend, Grid, Quantizer, tensors_of
from slimkit.progress import track
from slimkit.quantization.fake import Choice, FakeQuantization, Maker, QuantizedModel
from slimkit.registry import discover


def maker(choice: Choice) -> Maker:
    """What makes the chosen quantizer for a grid."""
    name = choice if isinstance(choice, str) else choice["name"]
    options = {} if isinstance(choice, str) else dict(choice.get("options", {}))

    def make(grid: Grid) -> Quantizer:
        return discover().create("quantizer", name, options, grid)

    return make


@torch.no_grad()
def calibrate_(
    fake: FakeQuantization, model: nn.Module, batches: Iterable[Any], count: int
) -> None:
    """Let the activation quantizers observe `count` batches, then switch rounding on.

    Raises:
        QuantizationError: no batch, one that the model does not take, or NaN or infinity in the
            data or inside the model.
    """
    fake.state = "observe"
    used = 0
    try:
        for batch in track(islice(batches, count), "calibrating", count):
            inputs = inputs_of(batch, model)
            if not finite(inputs):
                raise QuantizationError(f"calibration batch {used} holds NaN or infinity")
            with evaluating(model), _running(used, inputs), fake.active(model):
                model(*inputs)
            used += 1
    finally:
        fake.state = "float"
    if not used:
        raise QuantizationError("the calibration data is empty: it gave no batch")
    for name in fake.sites.activations:
        scale, _ = fake[name].qparams()
        if not all(math.isfinite(s) and s > 0 for s in scale.flatten().tolist()):
            raise QuantizationError(
                f"{type(fake[name]).__name__} gave a scale that is not positive and finite at "
                f"{name} after calibration"
            )
    fake.state = "quantize"


@contextmanager
def _running(number: int, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Say on which calibration batch the model fails inside the block."""
    try:
        yield
    except SlimkitError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of(inputs))
        raise QuantizationError(
            f"the model does not run on calibration batch {number} with inputs of shape {shapes}: "
            f"{type(error).__name__}: {error}"
        ) from error


def quantize(
    model: nn.Module,
    data: Iterable[Any],
    backend: str | Backend = "onnxruntime",
    *,
    weights: Choice = "minmax",
    activations: Choice = "percentile",
    batches: int = 16,
    keep_float: Sequence[str] = (),
) -> QuantizedModel:
    """A copy of `model` that simulates the backend's int8, calibrated on `data`.

    Args:
        model: a float model; it is not changed.
        data: batches, with or without labels; the first gives the shapes.
        backend: a plugin's name (see ``slimkit list-plugins --kind backend``), or an instance.
        weights: quantizer of the weights.
        activations: quantizer of the activations.
        batches: how many batches to calibrate on.
        keep_float: patterns of layers that stay in float.

    Returns:
        A module to evaluate, to train on (gradients pass straight through) or to export.

    Raises:
        QuantizationError: nothing would be quantized, or the data is unusable.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(),
        ...                           torch.nn.Linear(16, 4))
        >>> small = quantize(net, [torch.randn(4, 8)], backend="onnxruntime")
        >>> small(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """
    name = backend if isinstance(backend, str) else type(backend).__name__
    target = discover().create("backend", backend) if isinstance(backend, str) else backend
    own = copied(model)
    kept = list(islice(iter(data), batches))
    if not kept:
        raise QuantizationError("the calibration data is empty: it gave no batch")
    inputs = inputs_of(kept[0], own)
    if not finite(inputs):
        raise QuantizationError("calibration batch 0 holds NaN or infinity")
    with _running(0, inputs):
        fake = FakeQuantization.of(
            own, inputs, target.scheme, maker(weights), maker(activations), keep_float
        )
    calibrate_(fake, own, kept, batches)
    result = QuantizedModel(own, fake, name, (weights, activations))
    result.training = model.training  # its layers have their own flags, such as frozen batch-norms
    return result
