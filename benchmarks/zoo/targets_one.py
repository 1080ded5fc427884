"""One network on one target, foretold and tried, as one line of JSON.

python benchmarks/zoo/targets_one.py timm ghostnet_100 onnxruntime --seconds 1
python benchmarks/zoo/targets_one.py data resnet20 ncnn --data ../shared/data
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from one import build
from torch import Tensor, nn

import slimkit
from slimkit.batches import first_sample
from slimkit.calls import WEIGHTED, trace
from slimkit.deploy.agreement import Agreement, compare
from slimkit.deploy.deployed import Deployed, open_, simulate, size_bytes
from slimkit.deploy.measurement import measure
from slimkit.deploy.memory import peaks
from slimkit.deploy.preflight import preflight
from slimkit.deploy.release import is_integer
from slimkit.errors import SlimkitError
from slimkit.interfaces import Backend
from slimkit.quantization.fake import QuantizedModel
from slimkit.quantization.finished import finish
from slimkit.registry import discover

_PRODUCTS = frozenset({"matmul", "rmatmul", "imatmul", "bmm", "mm"})
CALIBRATION, TEST = 4, 2  # random images of an architecture of the zoo
_LAYER = re.compile(r"conv|gemm|matmul|linear|fully_?connected|inner_?product", re.IGNORECASE)


def layers(operators: dict[str, int]) -> int:
    """How many convolutions and products of a file compute on integers."""
    found = [(kind, n) for kind, n in operators.items() if is_integer(kind)]
    return sum(n for kind, n in found if _LAYER.search(kind.removeprefix("QLinear")))


def promised(fake: QuantizedModel, inputs: tuple[Any, ...]) -> int:
    """How many layers, and products that the scheme rounds, are to compute on integers."""
    sites, operations = fake.fake.sites, fake.fake.scheme.operations
    return sum(
        call.name in sites.weights
        if call.op in WEIGHTED
        else call.op in _PRODUCTS & operations and call.name not in sites.skipped
        for call in trace(fake.model, inputs).calls
    )


def tried(
    model: nn.Module, backend: Backend, example: tuple[Any, ...], folder: Path
) -> Deployed | str:
    """The opened file, or why there is none; compiled whatever `Backend.check` says."""
    folder.mkdir()
    try:
        deployable = finish(model, example)
        backend.compile(deployable, folder)
        return open_(backend, folder, deployable)
    except Exception as error:  # anything that a runtime raises where it was not asked before
        return _reason(error)


def judged(file: Deployed, expected: list[Tensor], test: Tensor) -> Agreement | str:
    """The file beside the model or the simulation on all of `test`."""
    try:
        return compare(expected, file.flat(test))
    except Exception as error:
        return _reason(error)


def row_of(
    model: nn.Module, calibration: Tensor, test: Tensor, backend: Backend, given: argparse.Namespace
) -> dict[str, Any]:
    """What was foretold and what came, for float and int8."""
    example = first_sample((test,))
    found: dict[str, Any] = {}
    begin = time.perf_counter()
    for said in preflight(model, example, {given.backend: backend}):
        found[said.kind] = {"problems": said.problems, "in_float": said.in_float}
        found[said.kind] |= {"slow": said.slow, "remarks": said.remarks}
    found["preflight_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    models = {"float": model}
    try:
        fake = slimkit.quantize(model, [*calibration.split(16)], backend, batches=1000)
        models["int8"] = fake
        found["int8"]["promised"] = promised(fake, example)
    except SlimkitError as error:
        found["int8"] |= {"failure": _reason(error), "promised": 0}
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), dict[str, Deployed]()
        for kind, made in models.items():
            row = found[kind]
            file = tried(made, backend, example, folder / kind)
            if isinstance(file, str):
                row["failure"] = file
                continue
            parts = [simulate(made, part) for part in test.split(16)]
            expected = [torch.cat(column) for column in zip(*parts, strict=True)]
            agreement = judged(file, expected, test)
            if isinstance(agreement, str):
                row["failure"] = agreement
                continue
            files[kind] = file
            row |= {"agrees": agreement.share, "decibels": min(agreement.sqnr_db)}
            row["kib"] = size_bytes(folder / kind) / 1024
            row["layers"] = layers(backend.operators(folder / kind))
            if given.score is not None:
                row["metric"] = given.score(file.flat(test))
        found["seconds"] = time.perf_counter() - begin
        if given.seconds:
            runners = {kind: file.runner for kind, file in files.items()}
            for kind, latency in measure(runners, example, seconds=given.seconds).items():
                found[kind]["ms"] = latency.median_ms
            compiled = {kind: (backend, folder / kind) for kind in files}
            for kind, peak in peaks(compiled, example).items():
                found[kind]["mib"] = None if peak.bytes is None else peak.bytes / 2**20
    return found


def _reason(error: Exception) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(said[:2])}"[:400]


def main() -> None:
    """Foretell, compile, compare, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["torchvision", "timm", "data"])
    parser.add_argument("name")
    parser.add_argument("backend")
    parser.add_argument("--data", help="the data folder, for the networks of benchmarks/tasks.py")
    parser.add_argument("--seconds", type=float, default=0.0, help="to measure each file for")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    given.score = None
    if given.library == "data":
        from tasks import task

        chosen = task(given.name, given.data)
        model, calibration, test = chosen.model, chosen.calibration, chosen.test
        given.score = chosen.score
    else:
        model, example = build(given.library, given.name)
        torch.manual_seed(1)
        calibration = torch.randn(CALIBRATION, *example.shape[1:])
        test = torch.randn(TEST, *example.shape[1:])
    row: dict[str, Any] = {"library": given.library, "name": given.name, "backend": given.backend}
    backend = discover().create("backend", given.backend)
    print(json.dumps(row | row_of(model, calibration, test, backend, given)))


if __name__ == "__main__":
    main()
