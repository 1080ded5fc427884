"""From a program of slimkit to a .tflite file, by way of litert-torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed operations
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimkit.errors import ExportError
from slimkit.importing import required
from slimkit.interfaces import Deployable
from slimkit.silence import captured, silenced

_ops = torch.ops.quantized_decomposed
_CONVERTER = "--no-deps --requirement plugins/slimkit-litert/converter.txt"  # of the repository


def convert(deployable: Deployable, *, integer_io: bool = False) -> bytes:
    """A .tflite file that computes what the program does.

    litert-torch lays the graph out channels last and lowers it through MLIR to TFLite's operators.
    Asked to quantize as well (its PT2E mode), it changes ranges: parts of a concatenation get the
    grid of the whole, a layer at the model's end loses its integers. So it is not asked, and what
    it leaves of slimkit's roundings becomes integers here.

    Args:
        deployable: not changed.
        integer_io: whether inputs and outputs are int8 where operators read or make integers.

    Raises:
        ExportError: LiteRT has no counterpart of an operation.
    """
    from slimkit_litert.graph import Graph  # imports the schema of ai-edge-litert
    from slimkit_litert.integers import integrate_, integrate_borders_
    from slimkit_litert.layout import straighten_
    from slimkit_litert.roundings import advance_

    graph = Graph(_converted(deployable))
    if deployable.quantized:
        advance_(graph)
        integrate_(graph)
    straighten_(graph)
    if integer_io:
        integrate_borders_(graph)
    return graph.packed()


def floats(data: bytes) -> list[str]:
    """What computes in float in a file that holds integers, one sentence for each kind."""
    from slimkit_litert.graph import Graph
    from slimkit_litert.runtime import named

    graph, shapes = Graph(data), dict[str, list[str]]()
    for operator in graph.operators:
        kind = named(graph, operator)
        if not kind.endswith("int8") and kind not in ("QUANTIZE", "DEQUANTIZE"):
            shape = "x".join(map(str, graph.shape(operator.outputs[0])))
            shapes.setdefault(kind, []).append(shape)
    return [
        f"{kind}, {len(gives)} operator{'s' if len(gives) > 1 else ''} (the first gives "
        f"{gives[0]}), computes in float: LiteRT has no integer one with these roundings; keep it, "
        "or use an operation that has"
        for kind, gives in sorted(shapes.items(), key=lambda item: -len(item[1]))
    ]


def _converted(deployable: Deployable) -> bytes:
    """What litert-torch makes of the program."""
    with silenced(), captured():
        litert_torch = required("litert_torch", "litert", _CONVERTER)
        litert_torch._config.config.show_progress = False
    module = _with_rounded_weights(deployable)
    try:
        with silenced(), captured(), torch.no_grad():
            converter = litert_torch.signature("serving_default", module, deployable.example_inputs)
            model = converter.convert(enable_x64=True)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.tflite"
                model.export(str(path))
                return path.read_bytes()
    except Exception as error:  # litert-torch and MLIR raise their own
        raise ExportError(
            f"litert-torch cannot convert this model: {reason(error)}. Replace that operation in "
            "the model by ones that LiteRT has, or cut it off and compute it outside"
        ) from error


def _with_rounded_weights(deployable: Deployable) -> nn.Module:
    """The program as a module whose integer constants are floats that are rounded in the graph.

    litert-torch drops the scale of a dequantization whose input is a constant of integers.
    """
    module = deployable.program.module()
    assert isinstance(module, GraphModule)
    _fold_constants_(module)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in (
            _ops.dequantize_per_channel.default,
            _ops.dequantize_per_tensor.default,
        ):
            _unfold_(module, node)
    _dequantize_apart_(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@torch.no_grad()
def _fold_constants_(module: GraphModule) -> None:
    """Compute what hangs on constants alone, such as the rounded view of a parameter.

    litert-torch folds such a rounding and then drops its scale.
    """
    for node in [*module.graph.nodes]:
        of_weights = "per_channel" in str(node.target)
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or of_weights or schema is None or schema.is_mutable:
            continue
        constants = {read: _constant(module, read) for read in node.all_input_nodes}
        if not constants or any(constant is None for constant in constants.values()):
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), constants.__getitem__)
        value = node.target(*args, **kwargs)
        if isinstance(value, Tensor):
            name = f"folded_{node.name}"
            module.register_buffer(name, value.clone())
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(name))


def _dequantize_apart_(module: GraphModule) -> None:
    """Give each reader a dequantization of its own.

    litert-torch 0.10 loses the shape of one that a padding, a norm or a sum shares with a layer,
    and then refuses to lay it out channels last. Those that are integers in the end leave no trace.
    """
    for node in [*module.graph.nodes]:
        if node.target is not _ops.dequantize_per_tensor.default:
            continue
        for reader in [*node.users][1:]:
            with module.graph.inserting_before(node):
                own = module.graph.node_copy(node)
            reader.replace_input_with(node, own)


def _unfold_(module: GraphModule, node: Node) -> None:
    """Let a dequantization of a constant be the constant in float, and weights rounded again."""
    constants = [_constant(module, value) for value in node.args[:3]]
    if constants[0] is None:
        return
    values = [c if c is not None else a for c, a in zip(constants, node.args[:3], strict=True)]
    target: Any = node.target
    name = f"float_{node.name}"
    module.register_buffer(name, target(*values, *node.args[3:]))
    with module.graph.inserting_before(node):
        numbers = module.graph.get_attr(name)
        if constants[0].dtype == torch.int32:  # a bias; its integers follow from its layer's scales
            node.replace_all_uses_with(numbers)
            return
        per_channel = target is _ops.dequantize_per_channel.default
        quantize = _ops.quantize_per_channel if per_channel else _ops.quantize_per_tensor
        rounded = module.graph.call_function(quantize.default, (numbers, *node.args[1:]))
        node.args = (rounded, *node.args[1:])


def _constant(module: GraphModule, value: Any) -> Tensor | None:
    """The tensor behind a node that reads an attribute."""
    if not isinstance(value, Node) or value.op != "get_attr":
        return None
    owner, _, name = str(value.target).rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    return found.detach() if isinstance(found, Tensor) else None


def reason(error: BaseException) -> str:
    """What was said in one line; it names the operation that has no counterpart."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "error:" in line] or lines or [type(error).__name__]
    return said[0].rpartition("error:")[2].strip().rstrip(".:")
