"""What computes nothing in evaluation goes: dropout, drop-path, identities.

Training goes without them from then on. Files never hold them; this is for a training that should
not drop, and for code that walks over modules.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from slimkit.calls import Call
from slimkit.evaluating import evaluating
from slimkit.rewriting.changes import Calls, Change, Removal, Swap
from slimkit.rewriting.found import Found, owner, traced

_DROPOUT = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
)


def remove_noops(model: nn.Module, inputs: tuple[Any, ...]) -> Found:
    """Modules that hand their input on leave an nn.Sequential, and become nn.Identity elsewhere.

    Args:
        model: not changed.
        inputs: the forward's arguments.
    """
    calls = traced(model, inputs).calls
    busy = {owner(c) for c in calls if c.op not in _DROPOUT}
    drops = [c for c in calls if c.op in _DROPOUT]
    left = {
        owner(c) or "the forward": "its dropout is active in evaluation, too"
        for c in drops
        if c.arguments.get("training", c.arguments.get(2, True))
    }
    changes: list[Change] = []
    gone: list[str] = []
    for path in _handing_on(model, inputs):
        inside = any(path.startswith(f"{outer}.") for outer in gone)
        works = any(o == path or o.startswith(f"{path}.") for o in busy)
        if inside or works or path in left:
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        if type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent):
            changes.append(Removal(path))
        elif not isinstance(model.get_submodule(path), nn.Identity):
            changes.append(Swap(path, "Identity"))
        else:
            left[path] = "the code of its parent calls it"
            continue
        gone.append(path)
    return Found([*changes, *_functional(drops, gone, left)], left)


def _functional(drops: list[Call], gone: list[str], left: dict[str, str]) -> list[Change]:
    """Dropout that a forward calls as a function."""
    rest = [
        call
        for call in drops
        if not any(owner(call) == path or owner(call).startswith(f"{path}.") for path in gone)
        and (owner(call) or "the forward") not in left
    ]
    return [
        Calls(path, dict.fromkeys((c.op for c in rest if owner(c) == path), "its input"), count)
        for path, count in Counter(map(owner, rest)).items()
    ]


@torch.no_grad()
def _handing_on(model: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """Paths of the modules without parameters that gave their input back whenever they ran."""
    names = {id(m): name for name, m in model.named_modules() if name}
    found: dict[str, bool] = {}

    def look(module: nn.Module, args: Any, out: Any) -> None:
        name = names.get(id(module))
        if name is None or next(module.parameters(), None) is not None:
            return
        same = len(args) == 1 and isinstance(out, Tensor) and out is args[0]
        found[name] = same and found.get(name, True)

    handle = register_module_forward_hook(look)
    try:
        with evaluating(model):
            model(*inputs)
    finally:
        handle.remove()
    return [name for name in names.values() if found.get(name)]
