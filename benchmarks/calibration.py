"""What calibrating costs beside the plain float forwards: seconds and peak memory.

    PYTHONPATH=.venv-test/zoo python benchmarks/calibration.py --output benchmarks/calibration.md

Every run is a process of its own on one core and reads the same images, batch by batch; imports and
the export of the ONNX file that the other tools read do not count. Seconds are those of the
processor, which others at work on the machine disturb least. All methods run in turn, several
rounds; the table has medians, and their ratio to the plain forwards of the same images. NNCF has a
row where it can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from zoo.one import build

import slimkit

PLAIN = "plain forward"
OURS = ("minmax", "moving-average", "percentile", "kl", "mse", "aciq")
PEERS = ("onnxruntime minmax", "onnxruntime entropy")
NNCF = "nncf"
POOL = 16  # different images; more are these again, as time and memory do not depend on them


def images(batch: int, count: int) -> Iterator[Tensor]:
    """So many images in batches."""
    pool = torch.randn(POOL, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    parts = pool.split(batch)
    for start in range(0, count, batch):
        yield parts[start // batch % len(parts)]


def plain(model: nn.Module, batch: int, count: int) -> None:
    """The float forwards alone."""
    with torch.no_grad():
        for x in images(batch, count):
            model(x)


def with_onnxruntime(path: Path, method: str, batch: int, count: int) -> None:
    """ONNX Runtime's own tool in its default settings, as its documentation calls it."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = images(batch, count)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.left, None)
            return None if found is None else {"input": found.numpy()}

    method = {"minmax": "MinMax", "entropy": "Entropy"}[method]
    quantize_static(
        path,
        path.with_suffix(".int8.onnx"),
        Reader(),
        per_channel=True,
        calibrate_method=CalibrationMethod[method],
    )


def with_nncf(path: Path, batch: int, count: int) -> None:
    """NNCF's defaults on OpenVINO."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(path))
    data = nncf.Dataset(list(images(batch, count)), lambda x: x.numpy())
    nncf.quantize(model, data, subset_size=count)


def prepared(name: str, method: str, batch: int, count: int, folder: Path) -> Callable[[], object]:
    """What is measured, with everything imported that it needs."""
    model, _ = build("torchvision", name)
    if method == PLAIN:
        return lambda: plain(model, batch, count)
    if method in OURS:
        tiny = nn.Sequential(nn.Linear(4, 4))
        slimkit.quantize(tiny, [torch.randn(2, 4)], activations=method)
        batches = -(-count // batch)
        return lambda: slimkit.quantize(
            model, images(batch, count), activations=method, batches=batches
        )
    path = folder / "model.onnx"
    exported(name, path, batch)
    if method == NNCF:
        return lambda: with_nncf(path, batch, count)
    import onnxruntime.quantization  # noqa: F401

    return lambda: with_onnxruntime(path, method.split()[1], batch, count)


def exported(name: str, path: Path, batch: int) -> None:
    """Write the ONNX file in a process of its own, whose memory does not count."""
    code = (
        "import sys, torch; from zoo.one import build\n"
        "name, path, batch = sys.argv[1:]\n"
        "x = torch.randn(int(batch), 3, 224, 224)\n"
        "torch.onnx.export(build('torchvision', name)[0], (x,), path, input_names=['input'],"
        "external_data=False, verbose=False)"
    )
    command = [sys.executable, "-c", code, name, str(path), str(batch)]
    paths = [str(Path(__file__).parent), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    subprocess.run(command, check=True, capture_output=True, env=env)


def measure(name: str, method: str, batch: int, count: int) -> dict[str, Any]:
    """Seconds and peak memory (MiB) in this process."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(name, method, batch, count, Path(folder))
        begin = time.process_time()
        run()
        seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak}


def one(name: str, method: str, given: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures; one that dies or takes too long is a row as well."""
    command = [sys.executable, __file__, "--run", name, method]
    command += ["--images", str(given.images), "--batch", str(given.batch)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=given.limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"took more than {given.limit:.0f} s"}
    last = (done.stdout.splitlines() or [""])[-1]
    if last.startswith("{"):
        return json.loads(last)
    if done.returncode < 0:
        return {"failure": f"killed by signal {-done.returncode} (memory)"}
    return {"failure": (done.stderr.strip().splitlines() or ["failed"])[-1][:80]}


def line(name: str, method: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """One row of the table."""
    rows, base = found[name, method], found[name, PLAIN]
    title = f"slimkit {method}" if method in OURS else method
    if "failure" in rows[-1]:
        return f"| {name} | {title} | {rows[-1]['failure'].replace('|', '/')} | | |"
    seconds, peak = (statistics.median(r[key] for r in rows) for key in ("seconds", "peak_mib"))
    plain_seconds, plain_peak = (
        statistics.median(r[key] for r in base) for key in ("seconds", "peak_mib")
    )
    cells = [name, title, f"{seconds:.2f}", f"{seconds / plain_seconds:.2f}"]
    return f"| {' | '.join([*cells, f'{peak - plain_peak:+.0f}'])} |"


def main() -> None:
    """Measure, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "resnet50"])
    nncf_too = [NNCF] if find_spec("nncf") and find_spec("openvino") else []
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS, *nncf_too])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of slimkit's methods; others: one")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one process")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--run", nargs=2, help="measure one model and method in this process")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.run:
        print(json.dumps(measure(*given.run, given.batch, given.images)))
        return
    methods = [PLAIN, *given.methods]
    runs = [(n, m) for r in range(given.rounds) for n in given.models for m in methods if own(m, r)]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key in track(runs, "calibrating"):
        found.setdefault(key, []).append(one(*key, given))
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "onnxruntime", *nncf_too))
    where = f"{platform.machine()}, one core, {packages}"
    lines = [
        "| model | method | seconds | ratio | MiB over plain |",
        "| --- | --- | ---: | ---: | ---: |",
        *(line(name, method, found) for name in given.models for method in methods),
        "",
        f"{given.images} images of 224x224 in batches of {given.batch}; processor seconds, "
        f"medians of {given.rounds} processes, of other tools' a single one ({where}).",
        "",
    ]
    table = "\n".join(lines)
    print(table)
    if given.output is not None:
        given.output.write_text(table)


def own(method: str, round_: int) -> bool:
    """Whether a method has its turn in this round: the peers take minutes and run once."""
    return round_ == 0 or method == PLAIN or method in OURS


if __name__ == "__main__":
    main()
