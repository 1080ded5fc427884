"""Tells slimkit that this package has the backend ``openvino``; imports no runtime."""

from __future__ import annotations

from collections.abc import Iterator

from slimkit.hookspecs import Plugin, hookimpl


@hookimpl
def slimkit_backends() -> Iterator[Plugin]:
    """The backend of this package."""
    yield Plugin(
        "openvino", "slimkit_openvino.backend:OpenVino", "OpenVINO files for x86 and Arm processors"
    )
