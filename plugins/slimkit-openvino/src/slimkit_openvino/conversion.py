"""From a program of slimkit to an OpenVINO model, by way of ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimkit.errors import ExportError
from slimkit.interfaces import Deployable
from slimkit.onnx_export import to_onnx


def convert(deployable: Deployable, core: Any, folder: Path) -> Any:
    """An ``openvino.Model`` that computes what the program does.

    OpenVINO reads torch programs itself, but its reader drops the dequantization of integer weights
    (openvino 2026.4: it passes over ``quantized_decomposed.dequantize_per_channel``), and its
    ``convert_model`` reports each conversion to Intel's telemetry. ONNX has an operator for every
    one of slimkit's, and ``Core.read_model`` reports nothing.

    Args:
        deployable: not changed.
        core: an ``openvino.Core``.
        folder: empty; the ONNX file lies there for as long as the model is used.

    Raises:
        ExportError: ONNX or OpenVINO has no counterpart of an operation.
    """
    from slimkit_openvino import rewrites  # imports openvino, which `core` shows to be there

    path = folder / "model.onnx"
    to_onnx(deployable, "openvino").save(path)
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise ExportError(
            f"OpenVINO cannot read this model's ONNX file: {reason(error)}. "
            "Replace that operation in the model by ones that OpenVINO has"
        ) from error
    rewrites.keep_integers_(model)
    rewrites.round_inputs_(model)
    rewrites.clip_in_float_(model)
    rewrites.fold_(model)
    rewrites.rename_(model)
    return model


def reason(error: BaseException) -> str:
    """What OpenVINO says in one line; it names the operator that has no counterpart."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO begins with the places in its own source that the error came through
    said = [x for x in lines if not x.startswith(("Exception from", "Check '"))]
    first = (said or lines or [type(error).__name__])[0]
    return first.rstrip(".:")
