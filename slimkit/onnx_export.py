"""A finished program as ONNX, for the backends that go by way of it."""

from __future__ import annotations

from typing import Any

import torch

from slimkit.errors import ExportError
from slimkit.importing import required
from slimkit.interfaces import Deployable
from slimkit.silence import silenced


def to_onnx(deployable: Deployable, backend: str) -> Any:
    """The program as a `torch.onnx.ONNXProgram`; rounded tensors are QDQ pairs.

    Raises:
        ExportError: ONNX has no counterpart of an operation, or a package is missing.
    """
    required("onnx", backend)
    required("onnxscript", backend)
    try:
        with silenced():
            program = torch.onnx.export(
                deployable.program, (), dynamo=True, verbose=False, optimize=True
            )
    except Exception as error:  # torch.onnx wraps whatever a converter raised
        raise ExportError(
            f"torch.onnx cannot express this model: {_reason(error)}. "
            "Replace that operation in the model by ones that ONNX has"
        ) from error
    if program is None:
        raise AssertionError("torch.onnx.export returns a program when dynamo=True")
    return program


def _reason(error: BaseException) -> str:
    """The innermost cause in one line; it names the operator that has no ONNX counterpart."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
