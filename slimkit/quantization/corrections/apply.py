"""`apply_`: corrects a calibrated simulation, and keeps what measurably helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.calls import Call, trace
from slimkit.copies import copied
from slimkit.decibels import decibels
from slimkit.errors import QuantizationError
from slimkit.quantization.corrections.batchnorm import batchnorm_
from slimkit.quantization.corrections.beside import Meet, beside, joined
from slimkit.quantization.corrections.bias import bias_
from slimkit.quantization.corrections.equalize import equalize_
from slimkit.quantization.corrections.places import rounded_places
from slimkit.quantization.corrections.rounding import rounding_
from slimkit.quantization.fake import FakeQuantization
from slimkit.quantization.sensitivity import last_layers

NAMES = ("equalize", "rounding", "batchnorm", "bias")
"""In the order in which they are applied: shifts take back what is left, so they come last."""

MARGIN_DB = 0.25
"""What ``auto`` keeps raises the signal to noise at the last layers by this: 6 % less noise."""

HELD_OUT = 4
"""One batch of so many is kept to measure on."""


@dataclass(frozen=True)
class Correction:
    """What one correction did.

    Args:
        name: of the correction.
        before_db: signal to noise at the last layers without it, in decibels.
        after_db: with it.
        kept: whether the model has it.
        layers: layer -> signal to noise of its output before and after, in decibels.
        skipped: layer -> why the correction left it as it was.
        seconds: what it took.
    """

    name: str
    before_db: float
    after_db: float
    kept: bool
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def apply_(
    model: nn.Module,
    fake: FakeQuantization,
    batches: Sequence[tuple[Any, ...]],
    names: str | Sequence[str] = "auto",
    recalibrate: Callable[[], None] = lambda: None,
) -> list[Correction]:
    """Correct `model` by name, or by whatever gains.

    Of two batches or more every fourth, and the last, are held out: gains are measured on them,
    corrections are fitted to the others.

    Args:
        model: its parameters and buffers are changed, nothing else of it.
        fake: its calibrated simulation.
        batches: the forward's arguments, one tuple a batch.
        names: corrections of `NAMES`, applied in that order; or ``auto``: each is tried, and only
            those stay that raise the signal to noise at the last layers by `MARGIN_DB`.
        recalibrate: finds the ranges of `fake`'s activations afresh.

    Returns:
        What each did, in order.

    Raises:
        QuantizationError: there is no correction of that name, or no batch.
    """
    given = (names,) if isinstance(names, str) else tuple(names)
    automatic = given == ("auto",)
    given = NAMES if automatic else given
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise QuantizationError(
            f"there is no correction called {unknown[0]!r}: choose of {', '.join(NAMES)}, or auto"
        )
    if not batches:
        raise QuantizationError("corrections need calibration data: there is no batch")
    fitted, held = _parted(batches)
    measured = _Measure(model, fake, held)
    found = []
    before = measured(fake)
    for name in NAMES:
        if name not in given:
            continue
        saved = _Saved(model, fake)
        start = perf_counter()
        skipped = _correct_(name, model, measured.reference, fake, fitted)
        changed = saved.differs()
        if changed and name == "equalize":
            recalibrate()
            reference, measured.reference = measured.reference, copied(model)
        seconds = perf_counter() - start
        after = measured(fake) if changed else before
        kept = changed and (not automatic or after[0] >= before[0] + MARGIN_DB)
        layers = {k: (before[1][k], after[1][k]) for k in after[1]}
        found.append(Correction(name, before[0], after[0], kept, layers, skipped, seconds))
        if kept:
            before = after
        elif changed:
            saved.restore_()
            if name == "equalize":
                measured.reference = reference
    return found


def _parted(
    batches: Sequence[tuple[Any, ...]],
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Batches to fit to and batches to measure on; the same where there is only one."""
    if len(batches) < 2:
        return [*batches], [*batches]
    held = {*range(HELD_OUT - 1, len(batches), HELD_OUT), len(batches) - 1}
    fitted = [x for n, x in enumerate(batches) if n not in held]
    return fitted, [x for n, x in enumerate(batches) if n in held]


def _correct_(
    name: str,
    model: nn.Module,
    reference: nn.Module,
    fake: FakeQuantization,
    batches: list[tuple[Any, ...]],
) -> dict[str, str]:
    """Apply one correction; what it left out."""
    if name == "batchnorm":
        return batchnorm_(model, reference, fake, batches)
    inputs = joined(batches, trace(model, batches[0]))
    if name == "bias":
        return bias_(model, reference, fake, inputs)
    if name == "rounding":
        return rounding_(model, reference, fake, inputs)
    return equalize_(model, fake, inputs)


class _Measure:
    """Signal to noise at the last layers, and at every rounded layer, in decibels.

    Args:
        model: to simulate.
        fake: whose sites.
        batches: to measure on.
    """

    def __init__(
        self, model: nn.Module, fake: FakeQuantization, batches: list[tuple[Any, ...]]
    ) -> None:
        traced = trace(model, batches[0])
        self.model = model
        self.reference = copied(model)
        self.inputs = joined(batches, traced)
        self.layers = {place.end: place.layer for place in rounded_places(traced, fake.sites)}
        self.last = last_layers(traced)
        self.calls = [c for c in traced.calls if c.name in self.last or c.name in self.layers]

    def __call__(self, fake: FakeQuantization) -> tuple[float, dict[str, float]]:
        """Of the last layers together, and of each layer's output."""
        ratios: dict[str, float] = {}

        def compared(call: Call, target: Tensor) -> Meet:
            def meet(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                out = func(*args, **kwargs)
                signal = float(target.square().sum())
                if signal > 0:
                    ratios[call.name] = float((out - target).square().sum()) / signal
                return out

            return meet

        beside(self.model, self.reference, fake, self.inputs, self.calls, compared)
        last = [ratio for name, ratio in ratios.items() if name in self.last]
        mean = sum(last) / max(1, len(last))
        layers = {self.layers[k]: decibels(1.0, r) for k, r in ratios.items() if k in self.layers}
        return decibels(1.0, mean), layers


class _Saved:
    """The values of a model and its simulation, to go back to."""

    def __init__(self, model: nn.Module, fake: FakeQuantization) -> None:
        self.model, self.fake = model, fake
        self.values = [t.detach().clone() for t in _tensors(model)]
        self.quantizers = copied(fake.quantizers)
        self.begun = fake.get_extra_state()

    def differs(self) -> bool:
        """Whether any value of the model is another by now."""
        now = _tensors(self.model)
        return any(not torch.equal(t, v) for t, v in zip(now, self.values, strict=True))

    @torch.no_grad()
    def restore_(self) -> None:
        """Put every value back, to the last bit."""
        for tensor, values in zip(_tensors(self.model), self.values, strict=True):
            tensor.data.copy_(values)
        self.fake.quantizers = self.quantizers
        self.fake.set_extra_state(self.begun)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
