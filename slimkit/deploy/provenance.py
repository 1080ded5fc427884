"""Which plugins a model went through, each with the package and version that it came from."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
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


def options_of(name: str, backend: Backend) -> dict[str, Any]:
    """What a backend was made with, by its attributes, where it is not the default.

    Nothing, where the plugin of that name cannot be made with it again.
    """
    found: dict[str, Any] = {}
    try:
        for option, known in inspect.signature(type(backend)).parameters.items():
            value = getattr(backend, option, known.default)
            if value != known.default:
                value = str(value) if isinstance(value, Path) else value
                found[option] = json.loads(json.dumps(value, allow_nan=False))
        discover().create("backend", name, found)
    except Exception:  # attributes that are no options, or hold what JSON does not
        return {}
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
