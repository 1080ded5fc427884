"""ONNX Runtime on the CPU: a quantized ONNX file and a session that runs it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from slimkit.importing import required
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme
from slimkit.onnx_export import strip_, to_onnx
from slimkit.onnx_sessions import OnnxFile, summed_bits
from slimkit.trial import Trial

FILE = "model.onnx"
SINGLE_FILE_LIMIT = 2**31 - 2**20  # bytes of weights; protobuf holds less than 2 GiB


class OnnxRuntime(Backend):
    """An ONNX file of QuantizeLinear and DequantizeLinear pairs, fused by ONNX Runtime to integers.

    Activations are uint8 with a zero point: signed symmetric ones compute four times slower on
    x86. Weights are int8 per output channel, biases int32. Float convolutions compute 8 channels at
    once, 16 with AVX-512; odd counts cost more than they save.
    """

    channel_multiple = 8
    least_db = 80.0
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
        return self._trial.refused(deployable, lambda: _export(deployable))

    def weight_bits(self) -> int | None:
        """7 where ONNX Runtime overflows with 8 on this processor; found by a sum, once a process.

        https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "When and
        why do I need to try U8U8?"
        """
        return _weight_bits()

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.onnx``; from 2 GB on its weights lie beside it in ``model.onnx.data``."""
        ir = required("onnx_ir", "onnxruntime", "onnxscript")
        model = self._trial.take(deployable) or _export(deployable)
        weights = sum(v.const_value.nbytes for v in model.graph.initializers.values())
        data = f"{FILE}.data" if weights > SINGLE_FILE_LIMIT else None
        ir.save(model, directory / FILE, external_data=data)

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Open a session that computes on `threads` threads, none of which spins while idle."""
        return _file(directory).runner(threads)

    def operators(self, directory: Path) -> dict[str, int]:
        """Operator types of the graph that ONNX Runtime executes after its own optimizations."""
        return _file(directory).operators()

    def profile(self, directory: Path, inputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Times of the kernels by ONNX Runtime's own profiler: the median of 20 runs."""
        return _file(directory).profile(inputs)


@cache
def _weight_bits() -> int | None:
    return summed_bits(OnnxRuntime().load)


def _file(directory: Path) -> OnnxFile:
    return OnnxFile(directory / FILE, "onnxruntime")


def _export(deployable: Deployable) -> Any:
    """The program as an `onnx_ir.Model` without anything that a runtime does not need."""
    program = to_onnx(deployable, "onnxruntime")
    required("onnx_ir", "onnxruntime", "onnxscript")
    from slimkit.builtin.backends.onnx_graph import keep_integers_

    model = program.model
    keep_integers_(model)
    strip_(model)
    for node in model.graph:
        node.name = None
    return model
