"""ONNX Runtime on the CPU: a quantized ONNX file and a session that runs it."""

from __future__ import annotations

import bisect
import itertools
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimkit.disk import refuse_full
from slimkit.errors import ExportError
from slimkit.importing import required
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme
from slimkit.onnx_export import to_onnx
from slimkit.trial import Trial

FILE = "model.onnx"
_WARM_UP, _PROFILED = 5, 20  # runs
SINGLE_FILE_LIMIT = 2**31 - 2**20  # bytes of weights; protobuf holds less than 2 GiB


class OnnxRuntime(Backend):
    """An ONNX file of QuantizeLinear and DequantizeLinear pairs, fused by ONNX Runtime to integers.

    Activations are uint8 with a zero point: signed symmetric ones compute four times slower on
    x86. Weights are int8 per output channel, biases int32. Float convolutions compute 8 channels at
    once, 16 with AVX-512; odd counts cost more than they save.
    """

    channel_multiple = 8
    scheme = Scheme(
        activations=Grid(bits=8, signed=False, symmetric=False),
        weights=Grid(bits=8, per_channel=True),
        operations=frozenset(
            {"conv1d", "conv2d", "conv3d", "linear", "matmul", "rmatmul", "bmm", "softmax"}
            | {"add", "iadd", "radd", "mul", "imul", "rmul", "cat", "concat", "concatenate"}
            | {"avg_pool2d", "adaptive_avg_pool2d", "mean", "sigmoid", "leaky_relu"}
        ),
        placement="tensors",
        keeps=frozenset(
            {"max_pool1d", "max_pool2d", "max_pool3d", "flatten", "reshape", "view", "permute"}
            | {
                "transpose",
                "t",
                "mT",
                "T",
                "squeeze",
                "unsqueeze",
                "dropout",
                "dropout2d",
                "contiguous",
            }
            | {"chunk", "split", "getitem", "narrow", "interpolate", "pad", "clone", "expand"}
            | {"swapaxes", "movedim", "unbind", "select", "detach", "unflatten"}
        ),
        fuses=frozenset({"batch_norm", "relu", "relu6", "hardtanh", "clamp", "clip"}),
        steps=frozenset({"silu"}),
        bias_bits=32,
        arithmetic="requantize",
    )

    def __init__(self) -> None:
        self._trial = Trial[Any]()

    def check(self, deployable: Deployable) -> list[str]:
        """What `torch.onnx` says against this program (it is exported on trial)."""
        try:
            self._trial.keep(deployable, _export(deployable))
        except ExportError as error:
            return [str(error)]
        return []

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.onnx``; from 2 GB on its weights lie beside it in ``model.onnx.data``."""
        ir = required("onnx_ir", "onnxruntime", "onnxscript")
        model = self._trial.take(deployable) or _export(deployable)
        weights = sum(v.const_value.nbytes for v in model.graph.initializers.values())
        data = f"{FILE}.data" if weights > SINGLE_FILE_LIMIT else None
        ir.save(model, directory / FILE, external_data=data)

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Open a session that computes on `threads` threads, none of which spins while idle."""
        session = _session(directory, threads)
        names = [i.name for i in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            if len(inputs) != len(names):
                raise ExportError(f"{FILE} takes {len(names)} inputs, {len(inputs)} were given")
            feed = {n: t.detach().cpu().numpy() for n, t in zip(names, inputs, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, feed)]

        return run

    def operators(self, directory: Path) -> dict[str, int]:
        """Operator types of the graph that ONNX Runtime executes after its own optimizations."""
        onnx = required("onnx", "onnxruntime")
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            _session(directory, 1, optimized)
            nodes = onnx.load(optimized, load_external_data=False).graph.node
            return dict(sorted(Counter(node.op_type for node in nodes).items()))

    def profile(self, directory: Path, inputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Times of the kernels by ONNX Runtime's own profiler: the median of 20 runs."""
        with tempfile.TemporaryDirectory() as folder:
            session = _session(directory, 1, profile=Path(folder) / "run")
            names = [i.name for i in session.get_inputs()]
            feed = {n: t.detach().cpu().numpy() for n, t in zip(names, inputs, strict=True)}
            for _ in range(_WARM_UP + _PROFILED):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        return _kernel_times(events)


def _kernel_times(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds per operator type and run, from the events of a profile."""
    runs = sorted(e["ts"] for e in events if e["name"] == "model_run")[_WARM_UP:]
    times = [Counter[str]() for _ in runs]  # microseconds
    for event in events:
        n = bisect.bisect_right(runs, event["ts"]) - 1
        if n >= 0 and event["name"].endswith("_kernel_time"):
            times[n][event["args"]["op_name"]] += event["dur"]
    types = sorted({name for one in times for name in one})
    return {name: statistics.median(one[name] for one in times) / 1000 for name in types}


def _session(
    directory: Path, threads: int, optimized: Path | None = None, profile: Path | None = None
) -> Any:
    runtime = required("onnxruntime", "onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal; anything less is raised as an exception anyway
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    path = directory / FILE
    single = not (directory / f"{FILE}.data").exists()
    try:
        model = path.read_bytes() if single else str(path)
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing: export again") from error
    except Exception as error:  # onnxruntime raises its own classes, which share no public base
        if optimized is not None:
            refuse_full(optimized.parent)
        raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error


def _export(deployable: Deployable) -> Any:
    """The program as an `onnx_ir.Model` without anything that a runtime does not need."""
    program = to_onnx(deployable, "onnxruntime")
    required("onnx_ir", "onnxruntime", "onnxscript")
    from slimkit.builtin.backends.onnx_graph import keep_integers_

    model = program.model
    keep_integers_(model)
    _strip_(model)
    return model


def _strip_(model: Any) -> None:
    """Drop names, types of inner values and metadata: they can outweigh int8 weights."""
    import onnx_ir.passes.common as common

    common.ClearMetadataAndDocStringPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    model.producer_name, model.producer_version = "slimkit", None
    graph = model.graph
    keep = {id(v): v.name for v in (*graph.inputs, *graph.outputs)}
    names = (name for i in itertools.count() if (name := f"t{i}") not in keep.values())
    inner = [v for n in graph for v in n.outputs] + list(graph.initializers.values())
    for value in (*graph.inputs, *inner):
        value.metadata_props.clear()
        if id(value) not in keep:
            value.name, value.shape, value.type = next(names), None, None
    for node in graph:
        node.name = None
