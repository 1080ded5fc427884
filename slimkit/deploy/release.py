"""Compiles the dense, the compressed and the int8 model for each runtime and measures the files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slimkit.batches import first_sample
from slimkit.deploy.agreement import Agreement, compare
from slimkit.deploy.deployed import Deployed, compile_, simulate, size_bytes, temporary
from slimkit.deploy.measurement import Latency, measure
from slimkit.errors import ExportError
from slimkit.interfaces import Backend
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

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which knows no NaN and no infinity: they become null."""
        data: dict[str, Any] = tree_map(
            lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf,
            asdict(self),
        )
        return data


@dataclass
class Stage:
    """One model to deploy on one runtime."""

    name: str
    runtime: str
    model: nn.Module
    directory: Path


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
    scratch = temporary()
    last = list(stages)[-1]
    opened: list[tuple[Stage, Deployed]] = []
    try:
        plan = [
            Stage(
                stage,
                runtime,
                model,
                exports / runtime if stage == last else scratch / stage / runtime,
            )
            for stage, models in stages.items()
            for runtime, model in models.items()
        ]
        for item in track(plan, "exporting"):
            item.directory.parent.mkdir(parents=True, exist_ok=True)
            _, deployed = compile_(
                item.model, backends[item.runtime], example_inputs, item.directory
            )
            opened.append((item, deployed))
        sample = [t for t in tree_leaves(first_sample(example_inputs)) if isinstance(t, Tensor)]
        latencies = measure(
            {f"{s.name} {s.runtime}": d.runner for s, d in opened}, tuple(sample), seconds=seconds
        )
        rows = []
        for item, deployed in track(opened, "comparing"):
            network = (
                getattr(item.model, "model", item.model) if item.name == "int8" else item.model
            )
            with torch.no_grad():
                agreement = compare(simulate(item.model, *compared), deployed.flat(*compared))
            rows.append(
                Row(
                    stage=item.name,
                    label=(labels or {}).get(item.name, item.name),
                    runtime=item.runtime,
                    metric=evaluate(deployed) if evaluate is not None else None,
                    parameters=parameters(network),
                    macs=macs(network, first_sample(example_inputs)),
                    size_bytes=size_bytes(item.directory),
                    latency=latencies[f"{item.name} {item.runtime}"],
                    agreement=agreement,
                    operators=backends[item.runtime].operators(item.directory),
                )
            )
        _integers_or_error(rows)
        return rows
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
            same = other.runtime == row.runtime and other.stage == "compressed"
            if same and row.size_bytes >= other.size_bytes:
                raise ExportError(
                    f"the int8 file for {row.runtime} has {row.size_bytes:,} bytes, the float "
                    f"file {other.size_bytes:,}: quantization saved nothing; the model is too "
                    "small for int8 to pay"
                )


def verdicts(rows: list[Row]) -> dict[str, str]:
    """Per runtime, whether int8 is worth it against float of the same model."""
    found = {}
    by = {(row.stage, row.runtime): row for row in rows}
    for (stage, runtime), row in by.items():
        plain = by.get(("compressed", runtime))
        if stage != "int8" or plain is None:
            continue
        ratio = row.latency.median_ms / plain.latency.median_ms
        if ratio < 1:
            found[runtime] = f"int8 takes {ratio:.2f} of the float time"
        else:
            found[runtime] = (
                f"int8 is not worth it here: it takes {ratio:.2f} of the float time; deploy the "
                "float file, or use a larger model or input"
            )
    return found
