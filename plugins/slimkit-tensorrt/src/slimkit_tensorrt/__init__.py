"""Tells slimkit that this package has the backend ``tensorrt``; imports no runtime."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """The backend of this package."""
    yield Plugin(
        "tensorrt", "slimkit_tensorrt.backend:TensorRT", "ONNX files by TensorRT's rules, for GPUs"
    )
