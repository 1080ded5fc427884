"""Writes a finished program down as the made-up NPU's steps and constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from slimkit.interfaces import Deployable

_PLAIN = (bool, int, float, str, type(None))


def written(
    deployable: Deployable,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The steps, the constants by name as arrays, and what stands in the way in sentences.

    A step is ``{"out": name, "op": name, "args": [...], "kwargs": {...}}``, where an argument is a
    plain value, a list, ``{"ref": name}`` for a tensor, or ``{"torch": name}`` for a type.
    """
    program, problems = deployable.program, list[str]()
    signature = program.graph_signature
    owners = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**program.state_dict, **program.constants}
    tensors: dict[str, Any] = {}
    graph: dict[str, Any] = {"inputs": [], "steps": [], "outputs": []}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in owners:
            given = node.meta["val"]
            if isinstance(given, Tensor):
                kind = str(given.dtype)
                graph["inputs"].append({"name": node.name, "shape": [*given.shape], "type": kind})
        elif node.op == "placeholder":
            constant = held[owners[node.name]]
            if node.users and isinstance(constant, Tensor):
                tensors[node.name] = constant.detach().cpu().numpy()
        elif node.op == "call_function":
            problems += _scales_of(node, held, owners)
            step = {"out": node.name, "op": _name(node)}
            try:
                step["args"] = [_argument(a) for a in node.args]
                step["kwargs"] = {k: _argument(a) for k, a in node.kwargs.items()}
            except TypeError as error:
                problems.append(f"{node.name}: {error}")
            graph["steps"].append(step)
        elif node.op == "output":
            graph["outputs"] = [
                a.name for a in torch.utils._pytree.tree_leaves(node.args) if isinstance(a, fx.Node)
            ]
        else:
            problems.append(f"{node.name}: the file has no {node.op}")
    return graph, tensors, problems


def _name(node: fx.Node) -> str:
    """Such as ``aten.conv2d.default``."""
    return "getitem" if not hasattr(node.target, "_schema") else str(node.target)


def _argument(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"ref": value.name}
    if isinstance(value, list | tuple):
        return [_argument(one) for one in value]
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"the file cannot hold an argument of type {type(value).__name__}")


def _scales_of(node: fx.Node, held: dict[str, Any], owners: dict[str, str]) -> list[str]:
    """The one odd rule that a model quantized for something else would break."""
    if not str(node.target).startswith("quantized_decomposed"):
        return []
    given: Any = node.args[1]
    scales = held[owners[given.name]].tolist() if isinstance(given, fx.Node) else [given]
    odd = next((s for s in scales if math.frexp(s)[0] != 0.5), None)
    if odd is None:
        return []
    return [f"{node.name}: its scale {odd:.6g} is no power of two; quantize for this backend"]
