"""Ranks the places that are rounded by the noise each of them causes when it alone is rounded.

Noise is compared where the last layers give their outputs, before a tail of concatenations and
sigmoids mixes quantities of different size (a detector's boxes and scores).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.calls import Call, CallMode, Trace, trace
from slimkit.decibels import decibels
from slimkit.evaluating import evaluating
from slimkit.interfaces import Scheme, tensors_of
from slimkit.progress import track
from slimkit.quantization.fake import FakeQuantization, QuantizedModel
from slimkit.quantization.sites import Sites, tail_of


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one place alone costs.

    Args:
        quantizer: its name in `Sites`.
        kind: ``activation`` or ``weight``.
        sqnr_db: signal to noise at the last layers' outputs, in decibels; infinite where nothing
            changes. The average over those outputs of noise / signal, turned into decibels.
        calls: the operations that compute in float if this place is not rounded.
    """

    quantizer: str
    kind: str
    sqnr_db: float
    calls: tuple[str, ...]


class _Watch(CallMode):
    """Keeps what some calls make."""

    def __init__(self, model: nn.Module, names: frozenset[str]) -> None:
        super().__init__(model)
        self.names = names
        self.found: list[Tensor] = []

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        out = func(*args, **kwargs)
        if name in self.names:
            self.found += [t.detach() for t in tensors_of(out) if t.is_floating_point()]
        return out


class Observed:
    """The outputs of a model's last layers on some batches, to measure noise against.

    Args:
        model: the float model.
        batches: the forward's arguments, one tuple a batch.
    """

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Any, ...]]) -> None:
        self.model = model
        self.batches = batches
        self.traced = trace(model, batches[0])
        self.names = last_layers(self.traced)
        self.float = [self._run(inputs, None) for inputs in batches]

    @torch.no_grad()
    def _run(self, inputs: tuple[Any, ...], fake: FakeQuantization | None) -> list[Tensor]:
        watch = _Watch(self.model, self.names)
        with evaluating(self.model):
            if fake is None:
                with watch:
                    out = self.model(*inputs)
            else:
                with fake.active(self.model), watch:
                    out = self.model(*inputs)
        return watch.found or [t for t in tensors_of(out) if t.is_floating_point()]

    def sqnr_db(self, fake: FakeQuantization) -> float:
        """Signal to noise of the simulation as it is set, in decibels."""
        noise, signal = self.noise(fake)
        ratios = [n / s for n, s in zip(noise, signal, strict=True) if s > 0]
        mean = sum(ratios) / max(1, len(ratios))
        return decibels(1.0, mean)

    def noise(self, fake: FakeQuantization) -> tuple[list[float], list[float]]:
        """Sums of squared differences and of squared values, one per watched output."""
        count = len(self.float[0])
        noise, signal = [0.0] * count, [0.0] * count
        for inputs, wanted in zip(self.batches, self.float, strict=True):
            for k, (x, y) in enumerate(zip(wanted, self._run(inputs, fake), strict=True)):
                noise[k] += float((x - y).square().sum())
                signal[k] += float(x.square().sum())
        return noise, signal


def last_layers(traced: Trace) -> frozenset[str]:
    """The calls whose outputs the tail mixes; where there is no tail, that make the outputs."""
    tail = tail_of(traced)
    readers = traced.readers()
    found = set()
    for call in traced.calls:
        if call.name in tail:
            continue
        behind = [r for number in call.outputs for r in readers.get(number, [])]
        if set(call.outputs) & traced.outputs or any(r.name in tail for r in behind):
            found.add(call.name)
    return frozenset(found)


def rank(
    quantized: QuantizedModel,
    batches: Sequence[tuple[Any, ...]],
    known: Iterable[Sensitivity] = (),
    done: Callable[[Sensitivity], None] = lambda _: None,
) -> list[Sensitivity]:
    """Every place that `quantized` rounds, the most harmful first.

    Args:
        quantized: calibrated; not changed.
        batches: the forward's arguments, one tuple a batch.
        known: results of an earlier, interrupted scan.
        done: called with each new result, to keep it.
    """
    fake = quantized.fake
    observed = Observed(quantized.model, batches)
    results = {one.quantizer: one for one in known}
    weights = {quantizer for quantizer, _ in fake.sites.weights.values()}
    names = [*fake.sites.activations, *sorted(weights)]
    try:
        for name in track([n for n in names if n not in results], "scanning"):
            fake.only = frozenset({name})
            kind = "weight" if name in weights else "activation"
            calls = tuple(kept_for(name, fake.sites, observed.traced, fake.scheme))
            results[name] = Sensitivity(name, kind, observed.sqnr_db(fake), calls)
            done(results[name])
    finally:
        fake.only = None
    return sorted((results[n] for n in names), key=lambda one: one.sqnr_db)


def kept_for(quantizer: str, sites: Sites, traced: Trace, scheme: Scheme) -> list[str]:
    """The calls that must compute in float for `quantizer` to be gone.

    They are those that read what it rounds and, where integer operations of `scheme` cannot give
    float, the one that makes it.
    """
    integer = scheme.operations | scheme.steps
    found = [call for call, (name, _) in sites.weights.items() if name == quantizer]
    found += [call for call, name in sites.inner.items() if name == quantizer]
    makers = {number: call for call in traced.calls for number in call.outputs}
    rounded = set[int]()
    for call in traced.calls:
        reads = sites.inputs.get(call.name, {})
        rounded.update(call.inputs[n] for n, name in reads.items() if name == quantizer)
        if sites.outputs.get(call.name) != quantizer:
            continue
        rounded.update(call.outputs)
        maker: Call | None = call
        while maker is not None and maker.op in scheme.fuses and maker.op not in integer:
            maker = makers.get(maker.inputs[0]) if maker.inputs else None
        if maker is not None and not scheme.float_outputs:
            found.append(maker.name)
    found += [call.name for call in traced.calls if rounded & set(call.inputs)]
    known = {call.name: call.op for call in traced.calls}
    return [name for name in dict.fromkeys(found) if known.get(name) in integer]
