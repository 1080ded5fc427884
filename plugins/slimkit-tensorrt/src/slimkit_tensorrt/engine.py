"""Builds, runs and times a TensorRT engine. NOT RUN where slimkit is developed.

slimkit's authors have no NVIDIA GPU: this file is written from the Python API reference of TensorRT
10 (`Builder`, `OnnxParser`, `ICudaEngine`, `IExecutionContext`,
https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/index.html). Tests call
`build` with a stand-in for the package, which shows which calls it makes and nothing else; `Engine`
has never been run. Everything that needs a GPU is here.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from slimkit.errors import ExportError
from slimkit.importing import required

_WARM_UP, _TIMED = 10, 50  # runs


def reason_against() -> str:
    """Why no engine can be built here; empty if one can."""
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    try:
        required("tensorrt", "tensorrt")
    except Exception as error:  # a missing driver library is an OSError in some versions
        return str(error)
    return ""


def build(onnx_file: bytes) -> bytes:
    """The serialized engine of an ONNX file, for the GPU and the TensorRT of this machine only.

    The network is strongly typed: every type is the file's, and none is chosen for speed.

    Args:
        onnx_file: a serialized ``ModelProto`` that holds its weights.

    Raises:
        ExportError: the parser or the builder refuses it.
    """
    trt = required("tensorrt", "tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_file):
        said = "; ".join(str(parser.get_error(n)) for n in range(parser.num_errors))
        raise ExportError(f"TensorRT's parser refuses the file: {said}")
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise ExportError("TensorRT builds no engine of this file: its log above says why")
    return bytes(plan)


class Engine:
    """An engine with buffers for its inputs and outputs on the GPU.

    Args:
        plan: what `build` gave.

    Raises:
        ExportError: the plan is of another GPU or TensorRT.
    """

    def __init__(self, plan: bytes) -> None:
        trt = required("tensorrt", "tensorrt")
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ExportError(
                "this engine was built for another GPU or TensorRT: export again on this machine"
            )
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            shape = tuple(self._engine.get_tensor_shape(name))
            kind = _types(trt)[self._engine.get_tensor_dtype(name)]
            buffer = torch.empty(shape, dtype=kind, device="cuda")
            self._context.set_tensor_address(name, buffer.data_ptr())
            reads = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self._inputs if reads else self._outputs).append(buffer)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs, in order, as CPU tensors."""
        if len(inputs) != len(self._inputs):
            raise ExportError(
                f"the engine takes {len(self._inputs)} inputs, {len(inputs)} were given"
            )
        with torch.cuda.stream(self._stream):
            for buffer, given in zip(self._inputs, inputs, strict=True):
                buffer.copy_(given)
            self._enqueue()
            outputs = [buffer.cpu() for buffer in self._outputs]
        self._stream.synchronize()
        return outputs

    def milliseconds(self, *inputs: Tensor) -> float:
        """Median time of one run on the GPU, without the copies from and to the host."""
        self(*inputs)
        times = []
        with torch.cuda.stream(self._stream):
            for turn in range(_WARM_UP + _TIMED):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                self._enqueue()
                end.record()
                end.synchronize()
                if turn >= _WARM_UP:
                    times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ExportError("TensorRT could not run the engine: its log above says why")


def _types(trt: Any) -> dict[Any, torch.dtype]:
    """TensorRT's types of inputs and outputs as torch's."""
    return {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.int64: torch.int64,
        trt.int32: torch.int32,
        trt.int8: torch.int8,
        trt.bool: torch.bool,
    }
