"""TensorRT: an ONNX file by its rules, an engine where there is a GPU, ONNX Runtime elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from slimkit.errors import ExportError, UnavailableError
from slimkit.importing import required
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme
from slimkit.onnx_sessions import OnnxFile
from slimkit.trial import Trial
from slimkit_tensorrt import engine

FILE, PLAN = "model.onnx", "model.engine"
_LIMIT = 2**31 - 2**20  # bytes; protobuf holds less than 2 GiB
_log = logging.getLogger("slimkit_tensorrt")


class TensorRT(Backend):
    """An ONNX file of explicit QuantizeLinear and DequantizeLinear pairs, as TensorRT wants them.

    Activations are int8 with a scale per tensor and no zero point, from -128 on; weights int8 with
    a scale per output channel; biases float. Convolutions, linear layers and both inputs of a sum
    are rounded; everything else is float. `slimkit_tensorrt.rules` checks the file.

    Where torch sees an NVIDIA GPU and the package ``tensorrt`` is installed, `compile` builds an
    engine as well and `load` runs it. Elsewhere `load` runs the file in ONNX Runtime on the CPU and
    warns of that once on the log ``slimkit_tensorrt``: times measured so are not TensorRT's.
    **slimkit's authors have no such GPU: no engine was ever built by this code.**

    Channels are pruned to multiples of 32, on which int8 tensor cores work (NVIDIA, "Optimizing
    for Tensor Cores"); not measured here.

    Args:
        precision: of layers that stay in float: ``fp32``, or ``fp16`` between casts in the file.
        runtime: what runs the file: ``tensorrt``, ``onnxruntime``, or ``auto``, the former where
            it can.
    """

    channel_multiple = 32
    float_variants: ClassVar[Mapping[str, Mapping[str, object]]] = {"fp16": {"precision": "fp16"}}
    scheme = Scheme(
        activations=Grid(bits=8, full=True),
        weights=Grid(bits=8, per_channel=True),
        operations=frozenset({"conv2d", "conv3d", "conv_transpose2d", "linear", "add", "iadd"})
        | frozenset({"radd"}),
        placement="tensors",
        keeps=frozenset(
            {"max_pool2d", "max_pool3d", "flatten", "reshape", "view", "permute", "transpose", "t"}
            | {"squeeze", "unsqueeze", "dropout", "dropout2d", "contiguous", "chunk", "split"}
            | {"getitem", "narrow", "clone", "swapaxes", "movedim", "unbind", "select", "detach"}
            | {"unflatten"}
        ),
        fuses=frozenset({"batch_norm", "relu", "relu6", "hardtanh", "clamp", "clip"}),
        float_outputs=True,
    )

    def __init__(
        self,
        *,
        precision: Literal["fp32", "fp16"] = "fp32",
        runtime: Literal["auto", "tensorrt", "onnxruntime"] = "auto",
    ) -> None:
        self.precision = precision
        self.runtime = runtime
        self._trial = Trial[Any]()

    def check(self, deployable: Deployable) -> list[str]:
        """What torch.onnx says against this program, or else what the rules say against its file.

        A refusal by TensorRT's own parser shows where there is a GPU only, in `compile`.
        """
        from slimkit_tensorrt.rules import rules

        def make() -> Any:
            return self._converted(deployable)

        said = self._trial.refused(deployable, make)
        return said or rules(self._trial.look(deployable, make))

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.onnx``, and ``model.engine`` where an engine can be built.

        Raises:
            ExportError: the file breaks a rule, or TensorRT refuses it.
        """
        from slimkit_tensorrt.rules import rules

        model = self._trial.take(deployable) or self._converted(deployable)
        problems = rules(model)
        if problems:
            raise ExportError("TensorRT would refuse this file: " + "; ".join(problems))
        data = model.SerializeToString()
        (directory / FILE).write_bytes(data)
        if self._builds():
            (directory / PLAN).write_bytes(engine.build(data))

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Open the engine, or the ONNX file in ONNX Runtime on `threads` threads of the CPU."""
        if self._builds():
            return engine.Engine(self._plan(directory))
        _warn_once(engine.reason_against() or "the option runtime asks for it")
        return _opened(directory).runner(threads)

    def operators(self, directory: Path) -> dict[str, int]:
        """Operator types that ONNX Runtime executes; of an engine, that there is one.

        TensorRT names its layers in its own inspector only. Where ONNX Runtime computes in float
        all that the file has for int8, as it does with what nothing rounds behind a layer, the
        layers that TensorRT takes for integers are counted beside.
        """
        if self._builds():
            return {self._engine_name(directory): 1}
        from slimkit_tensorrt.graph import integer_layers

        executed = _opened(directory).operators()
        if any("QLinear" in name or "QGemm" in name for name in executed):
            return executed
        if layers := integer_layers(_file(directory)):
            executed["int8 layers by TensorRT's rules"] = layers
        return executed

    def profile(self, directory: Path, inputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Times of ONNX Runtime's kernels; of an engine, its time on the GPU as a whole."""
        if self._builds():
            ran = engine.Engine(self._plan(directory))
            return {self._engine_name(directory): ran.milliseconds(*inputs)}
        return _opened(directory).profile(inputs)

    def _converted(self, deployable: Deployable) -> Any:
        """The ``onnx.ModelProto``."""
        required("onnx_ir", "tensorrt", "onnxscript")
        from slimkit_tensorrt.conversion import convert

        model = convert(deployable, half=self.precision == "fp16")
        if model.ByteSize() > _LIMIT:
            raise ExportError(f"the file would have over 2 GB: {FILE} holds its weights itself")
        return model

    def _builds(self) -> bool:
        """Whether TensorRT itself is used.

        Raises:
            UnavailableError: it is asked for and cannot be.
        """
        if self.runtime == "onnxruntime":
            return False
        reason = engine.reason_against()
        if reason and self.runtime == "tensorrt":
            raise UnavailableError(
                f"runtime: tensorrt cannot be had: {reason}; auto takes ONNX Runtime instead"
            )
        return not reason

    def _plan(self, directory: Path) -> bytes:
        """The engine of `directory`, built now if the export was made on another machine."""
        path = directory / PLAN
        return path.read_bytes() if path.exists() else engine.build(_file(directory))

    def _engine_name(self, directory: Path) -> str:
        return "engine int8" if b"QuantizeLinear" in _file(directory) else "engine"


@cache
def _warn_once(reason: str) -> None:
    _log.warning("%s runs in ONNX Runtime on the CPU (%s): not TensorRT's times", FILE, reason)


def _file(directory: Path) -> bytes:
    try:
        return (directory / FILE).read_bytes()
    except FileNotFoundError as error:
        raise ExportError(f"{directory / FILE} is missing: export again") from error


def _opened(directory: Path) -> OnnxFile:
    """The file for ONNX Runtime.

    Where ONNX Runtime would round weights or biases that the file has in float, and that come out
    as others (WeightBiasQuantization), nothing is fused to integers.
    """
    required("onnx", "tensorrt")
    from slimkit_tensorrt.graph import misfused

    path, data = directory / FILE, _file(directory)
    try:
        apart = misfused(data)
    except Exception as error:  # protobuf raises classes without a public base
        raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error
    return OnnxFile(path, "tensorrt", {"session.disable_quant_qdq": "1"} if apart else None)
