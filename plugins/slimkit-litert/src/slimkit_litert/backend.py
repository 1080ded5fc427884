"""LiteRT on the CPU: a .tflite file in float or int8, and an interpreter that runs it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from slimkit.errors import ExportError
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme
from slimkit.trial import Trial
from slimkit_litert import runtime
from slimkit_litert.conversion import convert, floats


class LiteRt(Backend):
    """A .tflite file (LiteRT, formerly TensorFlow Lite) for phones, boards and browsers.

    The full-integer scheme of TFLite
    (https://ai.google.dev/edge/litert/models/quantization_spec): activations are int8 with a zero
    point, one step a tensor; weights int8 per output channel; biases int32. XNNPACK scales sums in
    float32 and rounds half to even. An operator computes on integers only if what it gives is
    rounded, outputs of the model too; parts of a concatenation are brought to one step; sigmoid
    gives steps of 1/256. The ranges are slimkit's: litert-torch converts in float, and this package
    puts the integers in.

    Args:
        integer_io: whether the file takes and gives int8 where its first and last operators do, for
            devices that feed it integers; the steps stand in the file. The runner converts.
    """

    channel_multiple = 8
    least_db = 80.0
    scheme = Scheme(
        activations=Grid(bits=8, signed=True, symmetric=False),
        weights=Grid(bits=8, per_channel=True),
        operations=frozenset(
            {"conv1d", "conv2d", "linear", "add", "iadd", "radd", "mul", "imul", "rmul", "sub"}
            | {"cat", "concat", "concatenate", "mean", "avg_pool2d", "adaptive_avg_pool2d"}
            | {"sigmoid", "tanh"}
        ),
        placement="tensors",
        keeps=frozenset(
            {"max_pool1d", "max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "t"}
            | {"mT", "T", "squeeze", "unsqueeze", "dropout", "dropout2d", "contiguous", "chunk"}
            | {"split", "getitem", "narrow", "interpolate", "pad", "clone", "expand", "swapaxes"}
            | {"movedim", "unbind", "select", "detach", "unflatten"}
        ),
        fuses=frozenset({"batch_norm", "relu", "relu6", "hardtanh", "clamp", "clip"}),
        steps=frozenset({"silu"}),
        bias_bits=32,
        arithmetic="reciprocal",
        rounds_outputs=True,
        prescribed=(("sigmoid", 1 / 256, -128), ("tanh", 1 / 128, 0)),
    )

    def __init__(self, *, integer_io: bool = False) -> None:
        self.integer_io = integer_io
        self._trial = Trial[bytes]()

    def check(self, deployable: Deployable) -> list[str]:
        """What litert-torch or LiteRT says against this program (it is compiled on trial)."""
        return self._trial.refused(deployable, lambda: self._compiled(deployable))

    def remarks(self, deployable: Deployable) -> list[str]:
        """The operators of the file that compute in float though the model is in int8."""
        if not deployable.quantized:
            return []
        return floats(self._trial.look(deployable, lambda: self._compiled(deployable)))

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.tflite``."""
        data = self._trial.take(deployable) or self._compiled(deployable)
        (directory / runtime.FILE).write_bytes(data)

    def _compiled(self, deployable: Deployable) -> bytes:
        """The file, once LiteRT has opened it on trial and found the outputs of the program."""
        data = convert(deployable, integer_io=self.integer_io)
        interpreter = runtime.opened(data, "what litert-torch made of this model")
        _compare_shapes(interpreter, deployable)
        return data

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """An interpreter on `threads` threads, with XNNPACK for what it has kernels for."""
        data = runtime.read(directory)
        return runtime.runner(runtime.opened(data, str(directory / runtime.FILE), threads))

    def operators(self, directory: Path) -> dict[str, int]:
        """Operators of the file, which XNNPACK and LiteRT execute; integer ones have ``int8``."""
        return dict(sorted(Counter(runtime.operators(runtime.read(directory))).items()))

    def profile(self, directory: Path, inputs: tuple[Tensor, ...]) -> dict[str, float]:  # noqa: ARG002
        """Each operator timed alone, as the wheel has no profiler; times do not hang on values."""
        return runtime.times(runtime.read(directory))


def _compare_shapes(interpreter: Any, deployable: Deployable) -> None:
    """Refuse a model that was converted to another."""
    nodes = deployable.program.graph_module.graph.output_node().args[0]
    values = [node.meta["val"] for node in nodes if hasattr(node, "meta")]
    expected = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
    found = [tuple(details["shape"]) for details in interpreter.get_output_details()]
    if found != expected:
        raise ExportError(
            f"litert-torch gives outputs of the shapes {found}, and the model {expected}: it has "
            "misread an operation; replace that in the model, or cut it off and compute it outside"
        )
