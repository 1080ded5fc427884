"""Post-training int8 of the pretrained networks: slimkit beside each runtime's own tool.

    python benchmarks/quantization.py --data ../shared/data --output benchmarks/quantization.md

Same calibration and test inputs, one thread, all files of a network timed in turn. Every metric is
the deployed file's. `agrees`: with the float model, on its largest class. `file`: how far slimkit's
file gives the answers of slimkit's simulation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import METHODS, compiled, float_onnx, nncf_openvino, onnxruntime_tool, open_onnx
from rich.progress import track
from tasks import NAMES, Task, outputs, task
from torch import Tensor
from zoo.rows import machine

import slimkit
from slimkit.deploy.agreement import compare
from slimkit.deploy.measurement import measure
from slimkit.errors import SlimkitError
from slimkit.quantization.exact import exact
from slimkit.registry import discover

HEADS = """| network | runtime | tool | metric, float | int8 | agrees | file | dB |\
 ms, float | int8 | ratio | in float |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


@dataclass
class Made:
    """One int8 file."""

    runtime: str
    tool: str
    run: Any
    file: str = ""
    decibels: str = ""
    kept: str = ""


def slim(t: Task, runtime: str, given: argparse.Namespace, folder: Path) -> tuple[Made, Any]:
    """The int8 file of slimkit and its float file for one runtime."""
    plain = slimkit.export(t.model, t.example, runtime, directory=folder / f"{runtime}-float")
    quantized = slimkit.quantize(
        t.model,
        t.batches(),
        runtime,
        weights=given.weights,
        activations=given.activations,
        batches=10_000,
        keep_float=given.keep_float,
        **({"corrections": given.corrections} if given.corrections else {}),
    )
    made = slimkit.export(quantized, t.example, runtime, directory=folder / f"{runtime}-int8")
    with torch.no_grad():
        simulated = exact(quantized, (t.example,))
        agreement = compare(outputs(simulated, t.test), outputs(made.run, t.test))
    skipped = [
        name for name, why in quantized.fake.sites.skipped.items() if "rounding harms" in why
    ]
    weighed = f"{agreement.share:.2%}"
    return Made(runtime, "slimkit", made._deployed.runner, weighed, f"{min(agreement.sqnr_db):.0f}",
                str(len(skipped))), plain._deployed.runner  # fmt: skip


def peers(t: Task, runtime: str, folder: Path) -> list[Made]:
    """The files of the runtime's own tools."""
    source = folder / "float.onnx"
    if not source.exists():
        float_onnx(t.model, t.example, source)
    found: list[Made] = []
    if runtime == "onnxruntime":
        for method in METHODS:
            target = folder / f"{method}.onnx"
            try:
                onnxruntime_tool(source, t.batches(), method, target)
                found.append(Made(runtime, f"ONNX Runtime, {method}", open_onnx(target)))
            except Exception as error:
                say(f"{t.name}: ONNX Runtime's tool, {method}: {type(error).__name__}: {error}")
    if runtime == "openvino":
        try:
            found.append(Made(runtime, "NNCF", nncf_openvino(source, t.batches())))
        except ImportError as error:
            say(f"NNCF is left out: {error}")
        import openvino

        best = compiled(openvino.Core().read_model(str(source)), precision="bf16")
        found.append(Made(runtime, "none: float in bf16", best))
    return found


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def lines(t: Task, runtimes: list[str], given: argparse.Namespace) -> list[str]:
    """The rows of one network."""
    with torch.no_grad():
        reference = outputs(t.model, t.test)
    plain: dict[str, Any] = {}
    files: list[Made] = []
    refused: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for runtime in runtimes:
            try:
                made, plain[runtime] = slim(t, runtime, given, folder)
            except SlimkitError as error:
                refused.append((runtime, " ".join(str(error).split())))
                continue
            files += [made, *([] if given.no_peers else peers(t, runtime, folder))]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        runs = {f"{k} float": run for k, run in plain.items()}
        runs |= {f"{m.runtime} {m.tool}": m.run for m in files}
        times = measure(runs, (t.example,), seconds=given.seconds)
        torch.set_num_threads(threads)
        rows = [f"| {t.name} | {name} | slimkit | {why} |" for name, why in refused]
        for m in files:
            found = outputs(lambda x, run=m.run: one_by_one(run, x), t.test)
            agrees = ""
            if reference[0].dim() == 2:
                same = found[0].argmax(1) == reference[0].argmax(1)
                agrees = f"{same.double().mean():.1%}"
            before = times[f"{m.runtime} float"].median_ms
            after = times[f"{m.runtime} {m.tool}"].median_ms
            row = [t.name, m.runtime, m.tool, f"{t.score(reference):.4f}", f"{t.score(found):.4f}",
                   agrees, m.file, m.decibels, f"{before:.2f}", f"{after:.2f}",
                   f"{after / before:.2f}", m.kept]  # fmt: skip
            rows.append(f"| {' | '.join(row)} |")
            print(rows[-1], flush=True)
    return rows


def one_by_one(run: Any, x: Tensor) -> list[Tensor]:
    """Flat outputs of a file that takes one sample."""
    columns = zip(*(run(row.contiguous()) for row in x.split(1)), strict=True)
    return [torch.cat([y.clone() for y in column]) for column in columns]


def main() -> None:
    """Measure, print a Markdown table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the data folder")
    parser.add_argument("--only", default=",".join(NAMES), help="networks, separated by commas")
    parser.add_argument("--runtimes", default="onnxruntime,ncnn,openvino")
    parser.add_argument("--weights", default="minmax")
    parser.add_argument("--activations", default="percentile")
    parser.add_argument("--keep-float", nargs="*", default=["auto"])
    parser.add_argument("--corrections", default="auto", help="empty for none")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    known = {plugin.name for plugin in discover().plugins if plugin.kind == "backend"}
    runtimes = [name for name in given.runtimes.split(",") if name in known]
    if missing := set(given.runtimes.split(",")) - known:
        say(f"left out, not installed: {', '.join(sorted(missing))}")
    table = [HEADS]
    for name in track(given.only.split(","), "quantizing"):
        table += lines(task(name, given.data), runtimes, given)
    where = machine("torch", "onnxruntime", "openvino", "nncf", "ncnn")
    table += [
        "",
        f"Medians, one sample, one thread ({where}).",
    ]
    print("\n".join(table))
    if given.output is not None:
        given.output.write_text("\n".join([*table, ""]))


if __name__ == "__main__":
    main()
