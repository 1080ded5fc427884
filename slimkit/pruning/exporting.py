"""Writes a forward down with `torch.export`, which follows no values and refuses to guess."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from slimkit.pruning.written import Written
from slimkit.silence import silenced


def exported(model: nn.Module, example_inputs: tuple[Any, ...]) -> Written:
    """Export `model` and read its graph.

    Raises:
        Exception: whatever torch.export raises.
    """
    with torch.no_grad(), silenced():
        program = torch.export.export(model, example_inputs, strict=False)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    state: dict[fx.Node, list[str]] = {}
    constants = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
                state[node] = [spec.target]
            elif spec.kind != InputKind.USER_INPUT:
                constants.add(node)
        else:
            modules = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
            node.meta["module"] = modules[-1][0]
    return Written(program.graph, state, frozenset(constants))
