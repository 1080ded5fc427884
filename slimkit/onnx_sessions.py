"""An ONNX file in ONNX Runtime on the CPU: run, counted and timed, for backends that go by it."""

from __future__ import annotations

import bisect
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimkit.disk import refuse_full
from slimkit.errors import ExportError
from slimkit.importing import required
from slimkit.interfaces import Runner

_WARM_UP, _PROFILED = 5, 20  # runs


def summed_bits(load: Callable[[Path], Runner]) -> int | None:
    """7 where ONNX Runtime sums products of uint8 and 8-bit weights wrongly, found by trying.

    x86 processors without VNNI add two such products in 16 bits, where the largest ones stay
    32767; 255 * 63 * 2 fits.

    Args:
        load: opens the one ONNX file of a folder, here or on a device.

    Returns:
        None where 8 bits are right.
    """
    onnx = required("onnx", "onnxruntime")
    kinds, make, terms = onnx.TensorProto, onnx.helper, 8
    weight = make.make_tensor("w", kinds.INT8, [terms, 1], [127] * terms)
    given = make.make_tensor_value_info("x", kinds.UINT8, [1, terms])
    made = make.make_tensor_value_info("y", kinds.INT32, [1, 1])
    product = make.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = make.make_graph([product], "sum", [given], [made], [weight])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)], ir_version=8)
    with tempfile.TemporaryDirectory(prefix="slimkit-") as name:
        (Path(name) / "model.onnx").write_bytes(model.SerializeToString())
        (found,) = load(Path(name))(torch.full((1, terms), 255, dtype=torch.uint8))
    return None if int(found) == 255 * 127 * terms else 7


class OnnxFile:
    """What ONNX Runtime makes of one file; nothing is read before a method asks for it.

    Args:
        path: of the file, which lies in one piece or with its weights beside it, in a file of its
            name with ``.data`` behind it.
        backend: that needs onnxruntime, for the error if it is missing.
        entries: of the session's configuration, beside slimkit's own.
    """

    def __init__(self, path: Path, backend: str, entries: Mapping[str, str] | None = None) -> None:
        self.path, self.backend = path, backend
        self.entries = {"session.intra_op.allow_spinning": "0", **(entries or {})}

    def runner(self, threads: int = 1) -> Runner:
        """Computes on `threads` threads, none of which spins while idle.

        Raises:
            ExportError: there is no file, or ONNX Runtime cannot load it or run it.
        """
        session = self._session(threads)
        names = [i.name for i in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            feed = self._feed(names, inputs)
            try:
                found = session.run(None, feed)
            except MemoryError:
                raise
            except Exception as error:  # onnxruntime's classes share no public base
                raise ExportError(
                    f"{self.path.name} does not run on these inputs: {error}"
                ) from error
            return [torch.from_numpy(array) for array in found]

        return run

    def operators(self) -> dict[str, int]:
        """Operator types of the graph that it executes after its own optimizations."""
        onnx = required("onnx", self.backend)
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self._session(1, optimized)
            nodes = onnx.load(optimized, load_external_data=False).graph.node
            return dict(sorted(Counter(node.op_type for node in nodes).items()))

    def profile(self, inputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Milliseconds of each type's kernels by its own profiler: the median of 20 runs."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._session(1, profile=Path(folder) / "run")
            feed = self._feed([i.name for i in session.get_inputs()], inputs)
            for _ in range(_WARM_UP + _PROFILED):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        return _kernel_times(events)

    def _feed(self, names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        if len(inputs) != len(names):
            raise ExportError(
                f"{self.path.name} takes {len(names)} inputs, {len(inputs)} were given"
            )
        return {n: t.detach().cpu().numpy() for n, t in zip(names, inputs, strict=True)}

    def _session(
        self, threads: int, optimized: Path | None = None, profile: Path | None = None
    ) -> Any:
        runtime = required("onnxruntime", self.backend)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # fatal; anything less is raised as an exception anyway
        for name, value in self.entries.items():
            options.add_session_config_entry(name, value)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        single = not self.path.with_name(f"{self.path.name}.data").exists()
        try:
            model = self.path.read_bytes() if single else str(self.path)
            return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except FileNotFoundError as error:
            raise ExportError(f"{self.path} is missing: export again") from error
        except Exception as error:  # onnxruntime raises its own classes, which share no public base
            if optimized is not None:
                refuse_full(optimized.parent)
            raise ExportError(f"ONNX Runtime cannot load {self.path}: {error}") from error


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
