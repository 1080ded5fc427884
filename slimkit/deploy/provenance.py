"""Which plugins a model went through, each with the package and version that it came from."""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from slimkit.interfaces import Backend
from slimkit.quantization.fake import Choice, QuantizedModel
from slimkit.registry import discover

Used = tuple[str, str]
"""Kind and name; of an instance whose class no package registers, ``package.module:Class``."""


def used_by(network: nn.Module, quantized: Mapping[str, QuantizedModel]) -> list[Used]:
    """The criteria that `network` was pruned by and the quantizers of its simulations."""
    report = getattr(network, "slimkit_pruning", None)
    used = [("criterion", name) for name in getattr(report, "criteria", ())]
    for model in quantized.values():
        used += [("quantizer", _name(choice)) for choice in model.choices]
    return used


def _name(choice: Choice) -> str:
    return choice if isinstance(choice, str) else choice["name"]


def record(used: Iterable[Used]) -> list[dict[str, str | None]]:
    """What goes into a manifest: kind, name, package and version of each, once."""
    known = {(plugin.kind, plugin.name): plugin for plugin in discover().plugins}
    lines: list[dict[str, str | None]] = []
    for kind, name in dict.fromkeys(used):
        plugin = known.get((kind, name))
        package, version = (plugin.package, plugin.version) if plugin else (None, None)
        lines.append({"kind": kind, "name": name, "package": package, "version": version})
    return lines


def options_of(backend: Backend) -> dict[str, Any]:
    """What a backend was made with, by its attributes, where it is not the default."""
    found = {}
    for name, option in inspect.signature(type(backend)).parameters.items():
        with contextlib.suppress(TypeError, ValueError):  # JSON does not hold it
            value = json.loads(json.dumps(getattr(backend, name, option.default), allow_nan=False))
            if value != option.default:
                found[name] = value
    return found


def compare_versions(recorded: Sequence[Mapping[str, Any]]) -> None:
    """Warn of each plugin that comes from another package or version than was recorded."""
    known = {(plugin.kind, plugin.name): plugin for plugin in discover().plugins}
    for was in recorded:
        now = known.get((was["kind"], was["name"]))
        if now is not None and (now.package, now.version) != (was["package"], was["version"]):
            warnings.warn(
                f"{was['kind']} {was['name']} was {was['package']} {was['version']} when the "
                f"artifact was made; here it is {now.package} {now.version}",
                stacklevel=3,
            )
