"""Compiles the dense, the compressed and the int8 model for each runtime and measures the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimkit.batches import first_sample
from slimkit.deploy.agreement import Agreement, compare
from slimkit.deploy.deployed import (
    TOO_SMALL,
    Deployed,
    compile_,
    simulate,
    size_bytes,
    temporary,
)
from slimkit.deploy.measurement import Latency, measure, usable_threads
from slimkit.deploy.memory import Peak, peaks
from slimkit.errors import ExportError, SlimkitError
from slimkit.interfaces import Backend
from slimkit.plain import plain
from slimkit.progress import track
from slimkit.pruning.cost import macs, parameters

_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "quantized_decomposed.")

Evaluate = Callable[[Callable[..., Any]], float]
"""Takes something callable like the model, gives the task's metric on the evaluation data."""


@dataclass(frozen=True)
class Row:
    """What was measured of one deployed file.

    Args:
        stage: ``dense``, ``compressed`` (float) or ``int8``.
        label: the stage for people, such as ``pruned + distilled``.
        runtime: the backend's name.
        metric: the task's metric on the evaluation data, computed by the file; None without data.
        parameters: of the model.
        macs: multiply-accumulates of one sample.
        size_bytes: of the file or files.
        latency: of one sample on one thread.
        agreement: of the file with the float model or the simulation.
        operators: operator types that the runtime executes, with counts.
        variant: the runtime's own float precision, such as ``bf16``; empty for float32 and int8.
        latency_all: of one sample on all of `threads`; None where there is one.
        threads: that compute at once where the file runs: of this process, or of a device.
        peak_bytes: resident memory that opening and running the file adds to a process that has
            the runtime; None where it could not be measured.
        operator_ms: of one run on one thread, per operator type, where the runtime tells.
        unmeasured: what could not be measured, and why.
    """

    stage: str
    label: str
    runtime: str
    metric: float | None
    parameters: int
    macs: int
    size_bytes: int
    latency: Latency
    agreement: Agreement
    operators: dict[str, int]
    variant: str = ""
    latency_all: Latency | None = None
    threads: int = 1
    peak_bytes: int | None = None
    operator_ms: dict[str, float] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which knows no NaN and no infinity: they become null."""
        data: dict[str, Any] = plain(self)
        return data


@dataclass
class Stage:
    """One model to deploy on one runtime."""

    name: str
    runtime: str
    model: nn.Module
    backend: Backend
    directory: Path
    variant: str = ""
    unmeasured: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, self.runtime, self.variant]).strip()


def release(
    stages: Mapping[str, Mapping[str, nn.Module]],
    backends: Mapping[str, Backend],
    example_inputs: tuple[Any, ...],
    exports: Path,
    *,
    agreement_inputs: tuple[Any, ...] | None = None,
    evaluate: Evaluate | None = None,
    labels: Mapping[str, str] | None = None,
    seconds: float = 1.0,
) -> list[Row]:
    """Compile every stage for every backend, run the files and measure them.

    Args:
        stages: stage name -> backend name -> model (float, or the simulation for that backend);
            the last stage is what is deployed.
        backends: backend name -> backend.
        example_inputs: the forward's arguments; one sample is what latency is measured on.
        exports: the last stage's files are left in ``exports/<backend>``.
        agreement_inputs: real inputs to compare file and model on; left out, `example_inputs`.
        evaluate: gives the task's metric.
        labels: stage names for people, where they are not the stages' own.
        seconds: how long each file is timed, about.

    Raises:
        ExportError: a backend cannot compile a stage, or an int8 file computes nothing in int8.
    """
    compared = agreement_inputs if agreement_inputs is not None else example_inputs
    exports.parent.mkdir(parents=True, exist_ok=True)
    scratch = temporary(exports.parent)  # which a later run sweeps if this one is killed
    last = list(stages)[-1]
    try:
        plan = [
            Stage(
                stage,
                runtime,
                model,
                backends[runtime],
                exports / runtime if stage == last else scratch / stage / runtime,
            )
            for stage, models in stages.items()
            for runtime, model in models.items()
        ]
        opened: list[tuple[Stage, Deployed]] = []
        for item in track(plan, "exporting"):
            opened.append((item, _compiled(item, example_inputs)))
            opened += _variants(item, example_inputs, scratch)
        sample = tuple(
            t for t in tree_leaves(first_sample(example_inputs)) if isinstance(t, Tensor)
        )
        one = measure({str(s): d.runner for s, d in opened}, sample, seconds=seconds)
        files = [item for item, _ in opened]
        every = _on_all_threads(files, sample, seconds / 3)
        held = peaks({str(s): (s.backend, s.directory) for s in files}, sample)
        rows = []
        for item, deployed in track(opened, "comparing"):
            network = (
                getattr(item.model, "model", item.model) if item.name == "int8" else item.model
            )
            with torch.no_grad():
                agreement = compare(simulate(item.model, *compared), deployed.flat(*compared))
            label = (labels or {}).get(item.name, item.name)
            peak = held[str(item)]
            rows.append(
                Row(
                    stage=item.name,
                    label=f"{label}, {item.variant}" if item.variant else label,
                    runtime=item.runtime,
                    metric=evaluate(deployed) if evaluate is not None else None,
                    parameters=parameters(network),
                    macs=macs(network, first_sample(example_inputs)),
                    size_bytes=size_bytes(item.directory),
                    latency=one[str(item)],
                    agreement=agreement,
                    operators=item.backend.operators(item.directory),
                    variant=item.variant,
                    latency_all=every.get(str(item)),
                    threads=_threads(item.backend),
                    peak_bytes=peak.bytes,
                    operator_ms=item.backend.profile(item.directory, sample),
                    unmeasured={**item.unmeasured, **_problem(peak)},
                )
            )
        _integers_or_error(rows)
        return rows
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compiled(item: Stage, example_inputs: tuple[Any, ...]) -> Deployed:
    item.directory.parent.mkdir(parents=True, exist_ok=True)
    return compile_(item.model, item.backend, example_inputs, item.directory)[1]


def _variants(
    item: Stage, example_inputs: tuple[Any, ...], scratch: Path
) -> list[tuple[Stage, Deployed]]:
    """The compressed float model in the runtime's other precisions; one that fails is noted."""
    found = []
    for name, options in item.backend.float_variants.items() if item.name == "compressed" else ():
        try:
            backend = type(item.backend)(**options)
            other = replace(
                item, backend=backend, directory=scratch / name / item.runtime,
                variant=name, unmeasured={},
            )  # fmt: skip
            found.append((other, _compiled(other, example_inputs)))
        except SlimkitError as error:
            item.unmeasured[name] = "; ".join(line.strip(" :") for line in str(error).splitlines())
    return found


def _on_all_threads(
    files: list[Stage], sample: tuple[Tensor, ...], seconds: float
) -> dict[str, Latency]:
    """Latency of each file on every thread of where it runs; nothing of one that has only one."""
    runners = {
        str(s): s.backend.load(s.directory, threads=threads)
        for s in files
        if (threads := _threads(s.backend)) > 1
    }
    if not runners:
        return {}
    return measure(runners, sample, seconds=seconds, least_runs=10, what="measuring on all threads")


def _threads(backend: Backend) -> int:
    """How many threads compute at once where its files run."""
    return backend.threads() or usable_threads()


def _problem(peak: Peak) -> dict[str, str]:
    return {"peak memory": peak.problem} if peak.problem else {}


def is_integer(operator: str) -> bool:
    """Whether a runtime's operator computes on integers, by its name."""
    return "int8" in operator or operator.startswith(_INTEGER)


def _integers_or_error(rows: list[Row]) -> None:
    """Nothing happened is an error: an int8 file must compute in int8 and be smaller."""
    for row in rows:
        if row.stage != "int8":
            continue
        if row.operators and not any(map(is_integer, row.operators)):
            raise ExportError(
                f"{row.runtime} would run the int8 file entirely in float: {row.operators}; "
                "it fuses none of the model's quantized operations"
            )
        for other in rows:
            same = (other.runtime, other.stage, other.variant) == (row.runtime, "compressed", "")
            if same and row.size_bytes >= other.size_bytes:
                raise ExportError(
                    f"the int8 file for {row.runtime} has {row.size_bytes:,} bytes, the float "
                    f"file {other.size_bytes:,}: {TOO_SMALL}. Leave it in float"
                )
