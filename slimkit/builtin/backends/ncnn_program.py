"""Prepares a program for pnnx: floats only, a marker in front of each integer operation."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from slimkit.builtin.backends.ncnn_model import Rounding
from slimkit.builtin.backends.ncnn_rewrites import (
    properties_as_transpose_,
    strided_slices_as_pooling_,
    without_aliases_,
)
from slimkit.errors import ExportError
from slimkit.interfaces import Deployable


class Marker(nn.Module):
    """Survives pnnx as a layer of its own and so tells which layer's input is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """Anything that is not the identity, which pnnx would remove."""
        return x + 1.0


# Far from the small seeds that people choose: a placeholder that equals a weight of the model
# (an nn.Embedding right after torch.manual_seed(0)) would be found in its place.
PLACEHOLDERS = 7_767_517_000_000
MARKER = f"{Marker.__module__}.{Marker.__qualname__}"


def with_markers(deployable: Deployable) -> tuple[nn.Module, list[Rounding], list[list[int]]]:
    """The program in float with a marker in front of each integer operation."""
    # registers torch.ops.quantized_decomposed
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = deployable.program.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise AssertionError("ExportedProgram.module() is a GraphModule")
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())  # flat inputs and outputs
    for node in list(graph.nodes):
        if node.target == "_guards_fn" or "_assert" in str(node.target):
            graph.erase_node(node)
    without_aliases_(graph)
    strided_slices_as_pooling_(graph)
    properties_as_transpose_(graph)
    roundings: list[Rounding] = []
    for node in list(graph.nodes):
        if _name(node) in ("conv2d", "linear") and _is_activation(node.args[0]):
            roundings.append(_mark_(module, node, len(roundings)))
    for node in list(graph.nodes):
        if _is_activation(node) and node.users:
            user = next(iter(node.users))
            raise ExportError(
                f"ncnn rounds inputs of conv2d and linear only, not of {user.name}: "
                "take it out of the quantized operations"
            )
        if _is_constant(node) and node.users:
            _make_float_(module, node)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    (out,) = (node for node in graph.nodes if node.op == "output")
    results = [leaf for leaf in tree_leaves(out.args) if isinstance(leaf, fx.Node)]
    return module, roundings, [list(leaf.meta["val"].shape) for leaf in results]


def _mark_(module: fx.GraphModule, node: fx.Node, i: int) -> Rounding:
    """Put a marker in front of `node` and a placeholder in place of its weight."""
    graph, (x, w, *rest) = module.graph, node.args
    if not isinstance(x, fx.Node) or not isinstance(w, fx.Node) or not _is_constant(w):
        raise ExportError(f"{node.name} has an int8 input but no int8 weight: quantize both")
    quantize = x.args[0]
    if not isinstance(quantize, fx.Node):
        raise AssertionError("dequantize follows quantize")
    source, scale, zero, low, high = quantize.args[:5]
    if (zero, low, high) != (0, -127, 127):
        raise ExportError(
            f"ncnn rounds to -127..127 around 0, but the input of {node.name} is rounded to "
            f"{low}..{high} around {zero}: use the grid of this backend's scheme"
        )
    integers, weight_scale = _integers(module, w)
    random = torch.Generator().manual_seed(PLACEHOLDERS + i)
    placeholder = torch.randn(integers.shape, generator=random)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    module.add_module(f"marker_{i}", Marker())
    module.register_buffer(f"placeholder_{i}", placeholder)
    with graph.inserting_before(node):
        marker = graph.call_module(f"marker_{i}", (source,))
        weight = graph.get_attr(f"placeholder_{i}")
    node.args = (marker, weight, *rest)
    return Rounding(
        place=node.name,
        placeholder=placeholder.numpy(),
        weight=integers.numpy(),
        weight_scale=weight_scale.expand(integers.shape[0]).numpy(),
        input_scale=float(scale),  # type: ignore[arg-type]  # a Python constant by contract
        bias=_value(module, bias).numpy() if isinstance(bias, fx.Node) else None,
    )


def _make_float_(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a dequantized constant by the floats that it stands for."""
    name = f"float_{node.name}"
    module.register_buffer(name, _value(module, node))
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(module.graph.get_attr(name))


def _value(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The floats of a constant, be it dequantized or float already."""
    if not _is_constant(node):
        return _attribute(module, node).detach().float()
    integers, scale = _integers(module, node)
    axis = node.args[3] if _name(node) == "dequantize_per_channel" else 0
    shape = [-1 if i == axis else 1 for i in range(integers.dim())]
    return integers.float() * scale.reshape(shape)


def _integers(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Integers and scales (one, or one a channel) of a dequantized constant."""
    scale, zero = (
        _attribute(module, arg).reshape(-1).float()
        if isinstance(arg, fx.Node)
        else torch.tensor([float(arg)])  # type: ignore[arg-type]  # a number by the schema
        for arg in node.args[1:3]
    )
    if zero.any():
        raise ExportError(f"ncnn has symmetric weights only, but {node.name} has a zero point")
    weight = node.args[0]
    if not isinstance(weight, fx.Node):
        raise AssertionError("the operator's schema says that this is a tensor")
    return _attribute(module, weight).detach(), scale


def _attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    if node.op != "get_attr":
        raise ExportError(f"{node.name} is computed in the program; ncnn needs a constant there")
    return (
        module.get_parameter(str(node.target))
        if _is_parameter(module, node)
        else (module.get_buffer(str(node.target)))
    )


def _is_parameter(module: fx.GraphModule, node: fx.Node) -> bool:
    return str(node.target) in dict(module.named_parameters(remove_duplicate=False))


def _is_activation(node: object) -> bool:
    """Whether `node` dequantizes what was quantized just before, and is no constant."""
    return (
        isinstance(node, fx.Node)
        and _name(node) == "dequantize_per_tensor"
        and isinstance(node.args[0], fx.Node)
        and _name(node.args[0]) == "quantize_per_tensor"
    )


def _is_constant(node: fx.Node) -> bool:
    return _name(node).startswith("dequantize_per_") and not _is_activation(node)


def _name(node: fx.Node) -> str:
    """Name of an operator without namespace and overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return ""
