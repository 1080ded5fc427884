"""From a program of slimkit to an OpenVINO model, by way of ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from slimkit.errors import ExportError
from slimkit.interfaces import Deployable


def package(module: str, distribution: str | None = None) -> Any:
    """The imported module, or an error that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ExportError(
            f"the openvino backend needs {module}: pip install {distribution or module}"
        ) from error


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
    package("onnxscript")
    try:
        with _quiet():
            program = torch.onnx.export(
                deployable.program, (), dynamo=True, verbose=False, optimize=True
            )
            assert program is not None, "dynamo=True gives a program"
            program.save(path)
    except Exception as error:  # torch.onnx wraps whatever a converter raised
        raise ExportError(
            f"torch.onnx cannot express this model: {reason(error)}. "
            "Replace that operation in the model by ones that ONNX has"
        ) from error
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
    """The innermost cause in one line; it names the operator that has no counterpart."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO begins with the places in its own source that the error came through
    said = [x for x in lines if not x.startswith(("Exception from", "Check '"))]
    first = (said or lines or [type(error).__name__])[0]
    return first.rstrip(".:")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No prints, warnings or log lines from torch.onnx; errors still arrive as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
