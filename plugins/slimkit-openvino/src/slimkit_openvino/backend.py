"""OpenVINO on the CPU: an IR file in float or int8, and the compiled model that runs it."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from slimkit.disk import refuse_full
from slimkit.errors import ExportError
from slimkit.importing import required
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme
from slimkit.trial import Trial
from slimkit_openvino.conversion import convert, reason

XML, BIN = "model.xml", "model.bin"
_WARM_UP, _PROFILED = 5, 20  # runs


class OpenVino(Backend):
    """An OpenVINO IR file whose convolutions and linear layers compute on integers.

    OpenVINO's low precision transformations turn a layer into an integer kernel where its input is
    rounded to uint8 or int8 and its weight to int8
    (https://docs.openvino.ai/2024/documentation/openvino-ir-format/intermediate-representation-int8-inference.html).
    Such a kernel sums in int32, scales the sums to float32, and computes the bias, the activation
    and the rounding to the next layer's uint8 on the way out. So only what such a layer reads is
    rounded: activations, SiLU too, cost next to nothing in float. Sums of branches, means,
    concatenations and attention stay in float as well: as integers they are no faster, and a sum
    that is fused into a convolution leaves out the rounding of its inputs (openvino 2026.4), which
    no simulation would show.

    Activations are uint8 with a zero point, weights int8 per output channel, biases float.
    Convolutions compute 16 channels at once with AVX-512; the 17th costs as much as 16.

    Args:
        precision: of what is not an integer. ``f32`` agrees with the simulation. ``bf16`` and
            ``auto``, OpenVINO's own choice (bfloat16 where the processor has it), are faster and
            keep 8 bits of each number.
    """

    channel_multiple = 16
    float_variants: ClassVar[Mapping[str, Mapping[str, object]]] = {"bf16": {"precision": "bf16"}}
    scheme = Scheme(
        activations=Grid(bits=8, signed=False, symmetric=False),
        weights=Grid(bits=8, per_channel=True),
        operations=frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"}),
        placement="tensors",
        keeps=frozenset(
            {"max_pool1d", "max_pool2d", "max_pool3d", "flatten", "reshape", "view", "permute"}
            | {"transpose", "t", "mT", "T", "squeeze", "unsqueeze", "dropout", "dropout2d"}
            | {"contiguous", "chunk", "split", "getitem", "narrow", "interpolate", "pad", "clone"}
            | {"expand", "swapaxes", "movedim", "unbind", "select", "detach", "unflatten"}
        ),
        fuses=frozenset({"batch_norm", "relu", "relu6", "hardtanh", "clamp", "clip"}),
        float_outputs=True,
        arithmetic="fused",
    )

    def __init__(self, *, precision: Literal["f32", "bf16", "auto"] = "f32") -> None:
        self.precision = precision
        self.least_db = 80.0 if precision == "f32" else 20.0  # type: ignore[misc]
        self._trial = Trial[dict[str, bytes]]()

    def check(self, deployable: Deployable) -> list[str]:
        """What torch.onnx or OpenVINO says against this program (it is compiled on trial)."""
        return self._trial.refused(deployable, lambda: self._compiled(deployable))

    def weight_bits(self) -> int | None:
        """7 where OpenVINO overflows with 8 on this processor; found by a sum, once a process.

        https://docs.openvino.ai/latest/pot_saturation_issue.html
        """
        return _weight_bits()

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.xml``, the graph, and ``model.bin``, its constants."""
        files = self._trial.take(deployable) or self._compiled(deployable)
        for name, data in files.items():
            (directory / name).write_bytes(data)

    def _compiled(self, deployable: Deployable) -> dict[str, bytes]:
        """Each file's name and content, once OpenVINO has compiled them on trial."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = convert(deployable, _core(), folder)
            _compare_shapes(self._prepare(model, "this model"), deployable)
            try:
                _openvino().save_model(model, folder / XML, compress_to_fp16=False)
            except RuntimeError as error:
                refuse_full(folder)
                raise ExportError(f"OpenVINO cannot write {XML}: {reason(error)}") from error
            graph = re.sub(rb">\s+<", b"><", (folder / XML).read_bytes())  # half is indentation
            return {XML: graph, BIN: (folder / BIN).read_bytes()}

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Compile for one request at a time on `threads` threads, bound to no core."""
        compiled = self._open(directory, threads)
        request = compiled.create_infer_request()
        count, outputs = len(compiled.inputs), range(len(compiled.outputs))

        def run(*inputs: Tensor) -> list[Tensor]:
            if len(inputs) != count:
                raise ExportError(f"{XML} takes {count} inputs, {len(inputs)} were given")
            feed = {n: t.detach().cpu().contiguous().numpy() for n, t in enumerate(inputs)}
            try:
                request.infer(feed, share_inputs=True)
            except (RuntimeError, TypeError) as error:
                raise ExportError(f"{XML} does not run on these inputs: {reason(error)}") from error
            return [torch.from_numpy(request.get_output_tensor(n).data.copy()) for n in outputs]

        return run

    def operators(self, directory: Path) -> dict[str, int]:
        """Node types of the graph that OpenVINO executes; integer kernels have ``int8`` behind."""
        names = _executed(self._open(directory, 1))
        return dict(sorted(Counter(names.values()).items()))

    def profile(self, directory: Path, inputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Times of the kernels by OpenVINO's own counters: the median of 20 runs."""
        compiled = self._open(directory, 1, PERF_COUNT=True)
        names = _executed(compiled)
        request = compiled.create_infer_request()
        feed = {n: t.detach().cpu().contiguous().numpy() for n, t in enumerate(inputs)}
        times: dict[str, list[float]] = {name: [] for name in sorted(set(names.values()))}
        for turn in range(_WARM_UP + _PROFILED):
            request.infer(feed, share_inputs=True)
            if turn < _WARM_UP:
                continue
            run = Counter[str]()
            for kernel in request.get_profiling_info():
                if kernel.node_name in names:
                    run[names[kernel.node_name]] += kernel.real_time.total_seconds() * 1000
            for name, measured in times.items():
                measured.append(run[name])
        return {name: statistics.median(measured) for name, measured in times.items()}

    def _open(self, directory: Path, threads: int, **options: object) -> Any:
        """The compiled model of `directory`, which is read to the end."""
        core, path = _core(), directory / XML
        try:
            model = core.read_model(path.read_bytes(), (directory / BIN).read_bytes())
        except FileNotFoundError as error:
            raise ExportError(f"{error.filename} is missing: export again") from error
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot load {path}: {reason(error)}") from error
        return self._prepare(model, str(path), threads, **options)

    def _prepare(self, model: Any, name: str, threads: int = 1, **options: object) -> Any:
        core = _core()
        config: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # else a thread waits for whatever runs on its core
            **options,
        }
        if self.precision == "bf16" and "BF16" not in core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise ExportError("this processor has no bfloat16: choose precision: f32 or auto")
        if self.precision != "auto":
            config["INFERENCE_PRECISION_HINT"] = self.precision
        try:
            return core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot compile {name}: {reason(error)}") from error


def _compare_shapes(compiled: Any, deployable: Deployable) -> None:
    """Refuse a model that OpenVINO has misread: running it may end the process."""
    nodes = deployable.program.graph_module.graph.output_node().args[0]
    values = (node.meta["val"] for node in nodes if hasattr(node, "meta"))
    expected = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
    found = [output.get_partial_shape() for output in compiled.outputs]
    for number, (shape, given) in enumerate(zip(expected, found, strict=False)):
        if given.is_static and tuple(given.to_shape()) != shape:
            raise ExportError(
                f"OpenVINO gives output {number} the shape {tuple(given.to_shape())}, and the "
                f"model {shape}: it has misread an operation, such as a Fourier transform; "
                "replace that in the model, or cut it off and compute it outside"
            )


@cache
def _weight_bits() -> int | None:
    """By a convolution of the largest integers."""
    ops, channels = required("openvino.opset13", "openvino"), 16
    given = ops.parameter([1, channels, 1, 1], np.float32)
    ends = [ops.constant(np.float32(value)) for value in (0, 255, 0, 255)]
    integers = ops.convert(ops.constant(np.full((channels, channels, 1, 1), 127, np.int8)), "f32")
    weight = ops.multiply(integers, ops.constant(np.ones((channels, 1, 1, 1), np.float32)))
    made = ops.convolution(
        ops.fake_quantize(given, *ends, 256), weight, [1, 1], [0, 0], [0, 0], [1, 1]
    )
    model = _openvino().Model([made], [given])
    compiled = _core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1})
    found = compiled(np.full((1, channels, 1, 1), 255, np.float32))[0]
    return None if float(found.min()) > 0.99 * 255 * 127 * channels else 7


@cache
def _core() -> Any:
    return _openvino().Core()


def _openvino() -> Any:
    return required("openvino", "openvino")


def _executed(compiled: Any) -> dict[str, str]:
    """Node name -> type, of what a compiled model executes at every run."""
    names: dict[str, str] = {}
    constant: set[str] = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts, name = node.get_rt_info(), node.get_friendly_name()
        kind = facts["layerType"].astype(str)
        sources = [value.get_node() for value in node.input_values()]
        fed = [source.get_friendly_name() for source in sources]
        if kind == "Const" or (fed and constant.issuperset(fed)):
            constant.add(name)
        elif kind not in ("Input", "Output"):
            integer = facts["primitiveType"].astype(str).endswith("I8") or any(
                source.get_friendly_name() in constant
                and source.get_rt_info()["runtimePrecision"].astype(str) in ("i8", "u8")
                for source in sources
            )
            names[name] = f"{kind} int8" if integer else kind
    return names
