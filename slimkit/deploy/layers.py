"""Finds the first layer at which a deployed file departs from the simulation."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimkit.batches import first_sample, samples_of
from slimkit.decibels import decibels
from slimkit.deploy.agreement import differences
from slimkit.deploy.deployed import compile_, temporary
from slimkit.deploy.taps import Place, Tapped, places
from slimkit.errors import ExportError
from slimkit.interfaces import Backend, Runner, tensors_of
from slimkit.plain import plain
from slimkit.progress import track
from slimkit.quantization.exact import exact

LEAST_DB = 20.0
"""Below this ratio of signal to difference, a layer counts as departed: a tenth in amplitude."""

SAMPLES = 32
MOST_PLACES = 256
"""How many tensors one file gives beside its outputs."""

_FLOAT_DB = 100.0
"""Sums of float32 in another order differ by less."""


@dataclass(frozen=True)
class LayerAgreement:
    """How near the file is to the simulation at one tensor inside the model.

    Args:
        layer: what makes the tensor, such as ``layer1.0.conv1``; ``output 0`` where that is no
            layer.
        sqnr_db: ratio of the simulation's signal to the difference, in decibels; infinite where
            both are equal.
        largest_difference: in the tensor's own units.
        largest_steps: the same in steps of the grid that the tensor is rounded to; None in float.
        departed: fraction of values that are at least one step away; None in float.
    """

    layer: str
    sqnr_db: float
    largest_difference: float
    largest_steps: float | None
    departed: float | None


@dataclass(frozen=True)
class LayerReport:
    """The layers of one file in order of execution.

    Args:
        layers: the model's outputs last.
        least_db: the ratio below which a layer has departed.
        inputs: how many inputs were compared.
        left_out: how many tensors were not looked at, where there are too many for one file.
        same_db: ratio of the real file's outputs to the difference from those of the file with more
            outputs, which the runtime may compute in another way; infinite where they are equal.
        operators: operator types whose counts differ between the two, as (real, with more outputs).
    """

    layers: tuple[LayerAgreement, ...]
    least_db: float
    inputs: int
    left_out: int
    same_db: float
    operators: dict[str, tuple[int, int]]

    @property
    def first(self) -> LayerAgreement | None:
        """The first layer that has departed, or None."""
        return next((layer for layer in self.layers if not layer.sqnr_db >= self.least_db), None)

    @property
    def lowest(self) -> LayerAgreement:
        """The layer that is furthest away."""
        return min(self.layers, key=lambda layer: layer.sqnr_db)

    @property
    def verdict(self) -> str:
        """One sentence that names the layer to look at."""
        first = self.first
        if first is None:
            low = self.lowest
            if low.sqnr_db == math.inf:
                return "every layer equals the simulation to the last bit"
            stepped = next((layer for layer in self.layers if layer.departed), None)
            return (
                f"no layer is below {self.least_db:g} dB; the lowest is {low.layer} "
                f"with {low.sqnr_db:.1f} dB"
                + (f"; {stepped.layer} is the first with values a step off" if stepped else "")
            )
        before = self.layers[: self.layers.index(first)]
        so_far = f"the {len(before)} in front of it hold" if before else "it is the first of all"
        return (
            f"the file departs from the simulation at {first.layer}: {first.sqnr_db:.1f} dB, "
            f"below {self.least_db:g} dB; {so_far}"
        )

    @property
    def reservations(self) -> list[str]:
        """What the list cannot tell, one sentence each."""
        said = []
        if self.same_db < _FLOAT_DB:
            said.append(
                "the file with the extra outputs does not compute what the real file does (their "
                f"outputs agree to {self.same_db:.1f} dB): the runtime merges other operations "
                "where their results are asked for, or the real file was made in another way"
            )
        if self.operators:
            counts = ", ".join(f"{n}: {a} and {b}" for n, (a, b) in self.operators.items())
            said.append(f"the runtime executes other operators with the extra outputs ({counts})")
        if self.left_out:
            said.append(
                f"{self.left_out} tensors in between were left out; a layer that departs may lie "
                "among those in front of the one that is named"
            )
        return said


@dataclass
class _Sum:
    """Adds up how far one tensor is, over many samples."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    values: int = 0
    departed: int = 0
    step: float | None = field(default=None)

    def add(self, simulated: Tensor, deployed: Tensor) -> None:
        difference, signal = differences(simulated, deployed)
        self.signal += signal
        self.noise += difference.square().sum().item()
        if difference.numel():
            self.largest = max(self.largest, difference.max().item())
        self.values += difference.numel()
        if self.step is not None:
            self.departed += int((difference >= 0.99 * self.step).sum())

    def result(self, layer: str) -> LayerAgreement:
        steps = departed = None
        if self.step is not None:
            steps, departed = self.largest / self.step, self.departed / max(1, self.values)
        ratio = decibels(self.signal, self.noise)
        return LayerAgreement(layer, ratio, self.largest, steps, departed)


def per_layer(
    model: nn.Module,
    backend: Backend,
    inputs: tuple[Any, ...],
    *,
    real: Path | None = None,
    samples: int = SAMPLES,
    least_db: float = LEAST_DB,
    most: int = MOST_PLACES,
) -> LayerReport:
    """Compare what a runtime computes inside a model with the simulation, layer by layer.

    The model is compiled once more, with the tensors that its layers make as further outputs, into
    a temporary folder. A runtime may merge other operations in that file; so its outputs are
    compared with those of the real one, and every difference is reported.

    Args:
        model: a float model or a `QuantizedModel`; not changed.
        backend: the runtime.
        inputs: the forward's arguments, a batch of real data.
        real: folder with the deployed file; left out, it is compiled as well.
        samples: how many of the inputs are compared at most.
        least_db: ratio of signal to difference below which a layer has departed, in decibels.
        most: how many tensors are looked at, at most, spread evenly over the model.

    Raises:
        ExportError: the backend cannot compile the model with more outputs.
    """
    sample = first_sample(inputs)
    found = places(model, sample)
    inside = [place for place in found if not place.leaves]
    wanted = [inside[i] for i in spread(len(inside), most)]
    tapped = Tapped(model, wanted, sample, [place for place in found if place.leaves])
    scratch = temporary()
    try:
        if real is None:
            real = scratch / "real"
            compile_(model, backend, sample, real, compared=False)
        try:
            _, deployed = compile_(
                tapped.model, backend, sample, scratch / "tapped", compared=False
            )
        except ExportError as error:
            raise ExportError(
                f"the model cannot be compiled with its inner tensors as outputs, so its layers "
                f"cannot be compared: {error}"
            ) from error
        executed = backend.operators(real), backend.operators(scratch / "tapped")
        sums, same_db, count = _compared(
            tapped, deployed.runner, backend.load(real), wanted, inputs, samples
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    names = [place.layer for place in wanted]
    names += [
        f"output {n}" if place is None else f"{place.layer} (output)"
        for n, place in enumerate(tapped.outputs)
    ]
    return LayerReport(
        tuple(one.result(name) for one, name in zip(sums, names, strict=True)),
        least_db,
        count,
        len(inside) - len(wanted),
        same_db,
        _unequal(*executed),
    )


def _compared(
    tapped: Tapped,
    file: Runner,
    real: Runner,
    wanted: Sequence[Place],
    inputs: tuple[Any, ...],
    samples: int,
) -> tuple[list[_Sum], float, int]:
    """Sums over the samples for each wanted tensor and each output, and how near both files are."""
    leaving = len(tapped.outputs)
    steps = [place.step for place in wanted]
    steps += [None if place is None else place.step for place in tapped.outputs]
    sums = [_Sum(step=step) for step in steps]
    changed = _Sum()
    model = exact(tapped.model, first_sample(inputs))
    size = next(len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim())
    count = min(size, samples)
    for n in track(range(count), "comparing layers"):
        one = samples_of(inputs, n, n + 1)
        flat = [t.contiguous() for t in tree_leaves(one) if isinstance(t, Tensor)]
        with torch.no_grad():
            simulated, deployed = tensors_of(model(*one)), list(file(*flat))
        order = [*range(leaving, len(simulated)), *range(leaving)]
        for total, k in zip(sums, order, strict=True):
            total.add(simulated[k], deployed[k])
        for a, b in zip(real(*flat), deployed[:leaving], strict=True):
            changed.add(a, b)
    return sums, decibels(changed.signal, changed.noise), count


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced, the ends among them.

    >>> spread(3, 5), spread(9, 3)
    ([0, 1, 2], [0, 4, 8])
    """
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / max(1, most - 1)) for k in range(most)]


def _unequal(a: dict[str, int], b: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The counts that are not the same."""
    names = sorted({*a, *b})
    return {n: (a.get(n, 0), b.get(n, 0)) for n in names if a.get(n, 0) != b.get(n, 0)}


def as_plain(report: LayerReport) -> dict[str, Any]:
    """The report as plain data for JSON."""
    found: dict[str, Any] = plain(
        {
            "layers": report.layers,
            "first": None if report.first is None else report.first.layer,
            "least_db": report.least_db,
            "inputs": report.inputs,
            "same_db": report.same_db,
            "verdict": report.verdict,
            "reservations": report.reservations,
        }
    )
    return found
