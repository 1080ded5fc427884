"""`quantize`: finds activation ranges on real data and returns a model that simulates int8."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from slimkit.acceptance import check_module, check_single
from slimkit.batches import finite, first_sample, inputs_of, samples_of
from slimkit.calls import trace
from slimkit.copies import copied
from slimkit.errors import QuantizationError, SlimkitError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Backend, Grid, Quantizer, tensors_of
from slimkit.progress import track
from slimkit.quantization.corrections.apply import apply_
from slimkit.quantization.fake import Choice, FakeQuantization, Maker, QuantizedModel
from slimkit.quantization.folding import absorb_
from slimkit.quantization.mixed import fewest_in_float, without
from slimkit.registry import discover

AUTO = "auto"
SCANNED = 4  # samples on which the places are ranked
CORRECTED = 256  # samples that corrections are fitted to, all of them in memory


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
            _check(inputs, used)
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


def _check(inputs: tuple[Any, ...], number: int) -> None:
    """Refuse a batch that no range can be found on."""
    if not any(t.numel() for t in tensors_of(inputs)):
        raise QuantizationError(f"calibration batch {number} holds no sample")
    if not finite(inputs):
        raise QuantizationError(f"calibration batch {number} holds NaN or infinity")


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
    keep_float: str | Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    drop: float = 0.01,
    corrections: str | Sequence[str] = (),
    weight_bits: int | None = None,
) -> QuantizedModel:
    """A copy of `model` that simulates the backend's int8, calibrated on `data`.

    Args:
        model: a float model; it is not changed.
        data: batches, with or without labels; the first gives the shapes.
        backend: a plugin's name (see ``slimkit list-plugins --kind backend``), or an instance.
        weights: quantizer of the weights.
        activations: quantizer of the activations.
        batches: how many batches to calibrate on.
        keep_float: patterns of layers that stay in float; ``auto``, alone or among them, finds the
            places whose rounding harms the outputs (`slimkit.quantization.mixed`).
        evaluate: the task's metric of a module, larger is better, for ``auto``: the fewest places
            stay in float with which it loses no more than `drop`. Left out, those that alone add
            noise of 1 % of the signal's power.
        drop: how much of the metric may be lost.
        corrections: ``equalize``, ``rounding``, ``batchnorm``, ``bias``
            (`slimkit.quantization.corrections`), or ``auto``: those of them that measurably help.
            What they did is in the result's ``corrections``.
        weight_bits: width of the weights' integers, if narrower than the backend's own; left out,
            as wide as the runtime sums rightly here (`Backend.weight_bits`).

    Returns:
        A module to evaluate, to train on (gradients pass straight through) or to export.

    Raises:
        QuantizationError: nothing would be quantized, the data is unusable, or no choice of float
            places keeps the metric.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(),
        ...                           torch.nn.Linear(16, 4))
        >>> small = quantize(net, [torch.randn(4, 8)], backend="onnxruntime")
        >>> small(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """
    check_module(model, "quantize")
    if isinstance(model, QuantizedModel):
        raise QuantizationError(
            f"the model is quantized already, for {model.backend}: quantize the float model anew"
        )
    check_single(model)
    try:
        batches_of = iter(data)
    except TypeError as error:
        raise QuantizationError(
            f"data must give batches to calibrate on (a DataLoader, or a list of tensors), not "
            f"{type(data).__name__}"
        ) from error
    target = discover().create("backend", backend) if isinstance(backend, str) else backend
    name = backend if isinstance(backend, str) else discover().name_of("backend", target)
    given = [keep_float] if isinstance(keep_float, str) else list(keep_float)
    patterns = [pattern for pattern in given if pattern != AUTO]
    own = copied(model)
    stream = islice(batches_of, batches)  # not a list: a thousand images may not fit
    first = next(stream, None)
    if first is None:
        raise QuantizationError("the calibration data is empty: it gave no batch")
    inputs = inputs_of(first, own)
    _check(inputs, 0)
    with _running(0, inputs):
        sample = _traced_with(own, inputs)
        if target.scheme.weights.power_of_two:
            absorb_(own, trace(own, sample))
        fake = FakeQuantization.of(
            own,
            sample,
            target.scheme_with(weight_bits),
            maker(weights),
            maker(activations),
            patterns,
            inputs,
        )
    seen: list[tuple[Any, ...]] = []
    whole = chain([first], stream)
    calibrate_(fake, own, _noted(whole, own, seen) if corrections else whole, batches)
    result = QuantizedModel(own, fake, name, (weights, activations))

    def corrected(candidate: QuantizedModel) -> QuantizedModel:
        if corrections:
            network, ranges = candidate.model, candidate.fake
            again = partial(_recalibrate_, ranges, network, seen, maker(activations))
            candidate.corrections = apply_(network, ranges, seen, corrections, again)
        return candidate

    if AUTO in given:
        few = samples_of(inputs, 0, SCANNED)
        metric = None if evaluate is None else _in_evaluation(evaluate)
        least = None if metric is None else metric(own) - drop
        plain = copied(result) if corrections else result
        result, kept = fewest_in_float(corrected(result), [few], evaluate=metric, least=least)
        if corrections and kept:  # which were made for the noise of what is now in float
            anew = corrected(without(plain, [name for one in kept for name in one.calls], few))
            if metric is None or least is None or metric(anew) >= least:
                result = anew
    else:
        result = corrected(result)
    result.training = model.training  # its layers have their own flags, such as frozen batch-norms
    return result


def _noted(batches: Iterable[Any], model: nn.Module, seen: list[tuple[Any, ...]]) -> Iterator[Any]:
    """Pass `batches` on and put the inputs of the first 256 samples into `seen`."""
    count = 0
    for batch in batches:
        if count < CORRECTED:
            inputs = inputs_of(batch, model)
            sizes = [t.shape[0] for t in tensors_of(inputs) if t.dim()]
            seen.append(inputs)
            count += max(sizes, default=1)
        yield batch


def _recalibrate_(
    fake: FakeQuantization, model: nn.Module, seen: list[tuple[Any, ...]], make: Maker
) -> None:
    """Find the ranges of activations afresh."""
    fake.renew_activations_(make)
    calibrate_(fake, model, [(inputs,) for inputs in seen], len(seen))


@torch.no_grad()
def _traced_with(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first sample of the batch, or all of it where the model does not take one alone.

    A trace keeps every tensor of a forward in memory.
    """
    one = first_sample(inputs)
    try:
        with evaluating(model):
            model(*one)
    except Exception:  # whatever a model raises; the whole batch then tells what is wrong
        return inputs
    return one


def _in_evaluation(evaluate: Callable[[nn.Module], float]) -> Callable[[nn.Module], float]:
    """`evaluate` of a module in evaluation mode, which it leaves as it was."""

    def metric(module: nn.Module) -> float:
        with evaluating(module), torch.no_grad():
            return float(evaluate(module))

    return metric
