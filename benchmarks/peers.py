"""Int8 files by other tools: ONNX Runtime's quantization tool and NNCF on OpenVINO."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[..., list[Tensor]]
METHODS = ("minmax", "percentile", "entropy")


def float_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write the float model as ONNX with fixed shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False, optimize=True)
    assert program is not None
    program.save(path)


def onnxruntime_tool(path: Path, batches: list[Tensor], method: str, target: Path) -> None:
    """Quantize an ONNX file as the tool's documentation recommends: QDQ, uint8, per channel."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[Tensor] = (row for batch in batches for row in batch.split(1))

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else {name: row.numpy()}

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(path), str(prepared))
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=methods[method],
    )


def open_onnx(path: Path, threads: int = 1) -> Run:
    """A session as slimkit opens it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


def nncf_openvino(path: Path, batches: list[Tensor], threads: int = 1) -> Run:
    """Quantize an ONNX file with NNCF's defaults on OpenVINO and compile it in float32."""
    logging.getLogger("nncf").setLevel(logging.ERROR)
    import nncf
    import openvino

    rows = [row for batch in batches for row in batch.split(1)]
    model = openvino.Core().read_model(str(path))
    data = nncf.Dataset(rows, lambda row: row.numpy())
    return compiled(nncf.quantize(model, data, subset_size=len(rows)), threads)


def compiled(model: Any, threads: int = 1, precision: str = "f32") -> Run:
    """An OpenVINO model on so many threads."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }
    program = openvino.Core().compile_model(model, "CPU", settings)
    request = program.create_infer_request()

    def run(x: Tensor) -> list[Tensor]:
        found = request.infer([x.numpy()], share_inputs=True)
        return [torch.from_numpy(found[output].copy()) for output in program.outputs]

    return run
