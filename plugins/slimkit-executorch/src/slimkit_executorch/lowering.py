"""From a program of slimkit to an ExecuTorch program: rewritten, partitioned, compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimkit.errors import ExportError
from slimkit.interfaces import Deployable
from slimkit.silence import silenced
from slimkit_executorch import runtime
from slimkit_executorch.leaves import pin_ranges_
from slimkit_executorch.rewrites import rewrite_

_WAY_OUT = "replace that operation in the model, or cut it off and compute it outside"


def lowered(deployable: Deployable) -> bytes:
    """The content of the ``.pte`` file that computes what the program does.

    Args:
        deployable: not changed.

    Raises:
        ExportError: ExecuTorch has no counterpart of an operation; all that it lacks are named.
    """
    exir = runtime.part("exir")
    partitioner = runtime.part("backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner
    runtime.bindings()
    try:
        with silenced(), runtime.listening():
            edge = exir.to_edge_transform_and_lower(
                prepared(deployable),
                partitioner=[partitioner()],
                compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
            )
            _refuse_float_weights(edge.exported_program())
            made = edge.to_executorch()
    except ExportError:
        raise
    except Exception as error:  # ExecuTorch's passes raise whatever they meet
        raise ExportError(
            f"ExecuTorch cannot compile this model: {_reason(error)}; {_WAY_OUT}"
        ) from error
    _refuse_unknown(made.executorch_program)
    data: bytes = made.buffer
    return data


def prepared(deployable: Deployable) -> ExportedProgram:
    """The program as XNNPACK's partitioner wants it, without constants that nobody reads."""
    module = deployable.program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    rewrite_(module)
    pin_ranges_(module)
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        owner, _, last = name.rpartition(".")
        if name not in read:
            delattr(module.get_submodule(owner), last)
        elif not tensor.is_contiguous():
            delattr(module.get_submodule(owner), last)
            module.get_submodule(owner).register_buffer(last, tensor.detach().contiguous())
    module.recompile()
    inputs = torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.contiguous(), deployable.example_inputs
    )  # XNNPACK has its own way with images whose channels come last in memory
    with torch.no_grad():
        return torch.export.export(module, inputs, strict=False)


def try_out(data: bytes, deployable: Deployable) -> None:
    """Run a file once on the example inputs.

    Raises:
        ExportError: it cannot be loaded or run.
    """
    leaves = torch.utils._pytree.tree_leaves(deployable.example_inputs)
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    program = runtime.Loaded(data, "this model")
    try:
        with runtime.listening() as said:
            program(*inputs)
    except ExportError as error:
        raise ExportError(
            f"ExecuTorch does not run this model: {runtime.reason(error, said)}; {_WAY_OUT}"
        ) from error


def _refuse_float_weights(program: ExportedProgram) -> None:
    """Refuse a layer that XNNPACK left: its integer weights would become float at every run."""
    left = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and "dequantize_per_channel" in str(node.target)
    ]
    if left:
        readers = {str(reader.target) for node in left for reader in node.users}
        names = ", ".join(sorted(name.split(".")[-2] if "." in name else name for name in readers))
        raise ExportError(
            f"XNNPACK does not compute {len(left)} integer layers of this model ({names}): leave "
            "them in float with quantize.keep_float"
        )


def _refuse_unknown(program: Any) -> None:
    """Refuse operators that the runtime of this machine has no kernel for."""
    known = set(runtime.runtime().operator_registry.operator_names)
    missing = {
        f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        for plan in program.execution_plan
        for operator in plan.operators
    } - known
    if missing:
        raise ExportError(f"ExecuTorch has no kernel for {', '.join(sorted(missing))}: {_WAY_OUT}")


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
