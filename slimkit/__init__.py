"""slimkit makes a trained PyTorch model small and fast and proves it on the exported file.

Public names are imported when they are first used: ``import slimkit`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimkit.deploy.artifact import load
    from slimkit.deploy.export import Artifact, export
    from slimkit.deploy.preflight import Preflight, preflight
    from slimkit.deploy.save import save
    from slimkit.errors import SlimkitError
    from slimkit.hookspecs import Plugin, hookimpl
    from slimkit.pruning.prune import prune
    from slimkit.quantization.calibration import quantize
    from slimkit.recipe import Recipe
    from slimkit.rewriting.rewrite import rewrite
    from slimkit.training.module import SlimModule

_WHERE = {
    "Artifact": "slimkit.deploy.export",
    "Plugin": "slimkit.hookspecs",
    "Preflight": "slimkit.deploy.preflight",
    "Recipe": "slimkit.recipe",
    "SlimModule": "slimkit.training.module",
    "SlimkitError": "slimkit.errors",
    "export": "slimkit.deploy.export",
    "hookimpl": "slimkit.hookspecs",
    "load": "slimkit.deploy.artifact",
    "preflight": "slimkit.deploy.preflight",
    "prune": "slimkit.pruning.prune",
    "quantize": "slimkit.quantization.calibration",
    "rewrite": "slimkit.rewriting.rewrite",
    "save": "slimkit.deploy.save",
}

__all__ = [
    "Artifact",
    "Plugin",
    "Preflight",
    "Recipe",
    "SlimModule",
    "SlimkitError",
    "export",
    "hookimpl",
    "load",
    "preflight",
    "prune",
    "quantize",
    "rewrite",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module 'slimkit' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
