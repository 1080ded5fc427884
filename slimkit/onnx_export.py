"""A finished program as ONNX, for the backends that go by way of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
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


def strip_(model: Any) -> None:
    """Drop metadata and what the exporter calls inner values: they can outweigh int8 weights.

    Inputs and outputs keep their names.

    Args:
        model: an `onnx_ir.Model`.
    """
    import onnx_ir.passes.common as common

    common.ClearMetadataAndDocStringPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)
    model.producer_name, model.producer_version = "slimkit", None
    graph = model.graph
    keep = {id(v): v.name for v in (*graph.inputs, *graph.outputs)}
    names = (name for i in itertools.count() if (name := f"t{i}") not in keep.values())
    inner = [v for n in graph for v in n.outputs] + list(graph.initializers.values())
    for value in (*graph.inputs, *inner):
        value.metadata_props.clear()
        if id(value) not in keep:
            value.name, value.shape, value.type = next(names), None, None


def array_of(value: Any) -> np.ndarray[Any, Any] | None:
    """The constant that an `onnx_ir.Value` is; None if it is none, or no value."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def add_constant(graph: Any, array: np.ndarray[Any, Any]) -> Any:
    """A new constant of an `onnx_ir.Graph`, as an `onnx_ir.Value`."""
    import onnx_ir as ir

    taken = graph.initializers
    name = next(n for i in itertools.count(len(taken)) if (n := f"slimkit_{i}") not in taken)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _reason(error: BaseException) -> str:
    """The innermost cause in one line; it names the operator that has no ONNX counterpart."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
