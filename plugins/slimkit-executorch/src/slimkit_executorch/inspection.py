"""What a ``.pte`` file executes, in which precision, and how long each operator takes."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from slimkit.errors import ExportError
from slimkit.silence import silenced
from slimkit_executorch.runtime import Loaded, bindings, part

_WARM_UP, _PROFILED = 5, 20  # runs
_INFINITE = re.compile(r"\binf\b")  # a bound that there is not, which JSON has another word for

_NODES = {
    "Conv2d": ("Convolution", "Convolution"),
    "DepthwiseConv2d": ("ConvolutionDepthWise", "Convolution"),
    "ConvTranspose2d": ("Deconvolution", "Deconvolution"),
    "FullyConnected": ("InnerProduct", "Fully Connected"),
    "BatchMatrixMultiply": ("MatMul", "Batch Matrix Multiply"),
    "Multiply": ("Mul", "Multiply"),
    "Subtract": ("Sub", "Subtract"),
    "Divide": ("Div", "Divide"),
    "Hardswish": ("HardSwish", "HardSwish"),
    "AvgPooling2d": ("AveragePool", "Average Pooling"),
    "GlobalAvgPooling2d": ("ReduceMean", "Mean"),
    "MaxPooling2d": ("MaxPool", "Max Pooling"),
    "StaticConstantPad": ("Pad", "Constant Pad"),
    "StaticReshape": ("Reshape", "Static Reshape"),
    "StaticResizeBilinear2D": ("Resize", "Resize Bilinear"),
    "StaticSlice": ("Slice", "Slice"),
    "StaticTranspose": ("Transpose", "Transpose"),
    **{f"Concatenate{n}": ("Concat", "Copy") for n in range(2, 6)},
}
"""Node of an XNNPACK graph -> what it is called here, and what XNNPACK's profiler calls it."""


@dataclass(frozen=True)
class Step:
    """One operator of a file.

    Args:
        name: what it is called here; ``int8`` behind where it computes on integers.
        traced: how its name in a trace begins.
        instruction: the number of the program's instruction that it belongs to.
    """

    name: str
    traced: str
    instruction: int


def steps(data: bytes, name: str) -> list[Step]:
    """The operators of a file in the order of their execution.

    Args:
        data: the file's content.
        name: of the file, for messages.

    Raises:
        ExportError: it is no ExecuTorch program.
    """
    bindings()
    reader = part("exir._serialize._program")
    try:
        with silenced():
            program = reader.deserialize_pte_binary(data).program
            plan = program.execution_plan[0]
            return [*_steps(plan, program.backend_delegate_data)]
    except Exception as error:  # the reader raises whatever a damaged file leads to
        raise ExportError(
            f"ExecuTorch cannot read {name}: {error or type(error).__name__}"
        ) from error


def _steps(plan: Any, blobs: Sequence[Any]) -> Iterator[Step]:
    for number, instruction in enumerate(plan.chains[0].instructions):
        call = instruction.instr_args
        if hasattr(call, "op_index"):
            operator = plan.operators[call.op_index]
            yield Step(_kernel(operator.name), "native_call_", number)
        elif hasattr(call, "delegate_index"):
            blob = blobs[plan.delegates[call.delegate_index].processed.index].data
            yield from _nodes(_graph(bytes(blob)), number)


def _kernel(name: str) -> str:
    """A portable kernel's name; those of quantized_decomposed convert as XNNPACK's own do."""
    plain = name.rpartition("::")[2]
    if name.startswith("quantized_decomposed::"):
        return "Dequantize" if plain.startswith("dequantize") else "Quantize"
    return plain


def _nodes(graph: dict[str, Any], instruction: int) -> Iterator[Step]:
    kinds = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        kinds[tensor["id_out"]] = tensor["datatype"]
    for node in graph["xnodes"]:
        kind = node["xnode_union_type"].removeprefix("XNN").removeprefix("_XNN")
        ends = node["xnode_union"]
        first = next(ends[key] for key in ("input_id", "input1_id") if key in ends)
        reads, gives = (_integer(kinds.get(n, "")) for n in (first, ends["output_id"]))
        if kind == "Convert":
            kept = "Requantize" if reads else "Convert"
            yield Step(
                kept if reads == gives else "Quantize" if gives else "Dequantize",
                kind,
                instruction,
            )
            continue
        name, traced = _NODES.get(kind, (kind, kind))
        yield Step(f"{name} int8" if reads else name, traced, instruction)


def _integer(kind: str) -> bool:
    return kind.endswith("int8")


def _graph(blob: bytes) -> dict[str, Any]:
    """The graph in a delegate's data, by the compiler of schemas that ExecuTorch brings along."""
    serialize = part("backends.xnnpack.serialization.xnnpack_graph_serialize")
    flatbuffer = part("exir._serialize._flatbuffer")
    header = serialize.XNNHeader.from_bytes(blob[: serialize.XNNHeader.EXPECTED_LENGTH])
    begin = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schema = files("executorch.backends.xnnpack.serialization").joinpath("schema.fbs")
        (folder / "schema.fbs").write_bytes(schema.read_bytes())
        (folder / "graph.bin").write_bytes(blob[begin : begin + header.flatbuffer_size])
        flatbuffer._flatc_decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"))
        text = (folder / "graph.json").read_text()
        graph: dict[str, Any] = json.loads(_INFINITE.sub("Infinity", text))
        return graph


def counted(found: Sequence[Step]) -> dict[str, int]:
    """How many operators there are of each name."""
    return dict(sorted(Counter(step.name for step in found).items()))


def timed(data: bytes, name: str, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds per operator name: the median of 20 runs by ExecuTorch's own events.

    Args:
        data: the file's content.
        name: of the file, for messages.
        inputs: of one run.
    """
    found = steps(data, name)
    program = Loaded(data, name, traced=True)
    for _ in range(_WARM_UP + _PROFILED):
        program(*inputs)
    reader = part("devtools.etdump.serialize")
    with silenced():
        trace = reader.deserialize_from_etdump_flatcc(program.trace())
    runs = [
        _times([e.profile_event for e in run.events if e.profile_event], found)
        for run in trace.run_data
        if run.name == "Execute"
    ][_WARM_UP:]
    names = sorted({step.name for step in found})
    return {name: statistics.median(run[name] for run in runs) for name in names}


def _times(events: Sequence[Any], found: Sequence[Step]) -> Counter[str]:
    """Milliseconds of one run by name.

    Events come in the order of execution. One that begins no operator of the file (a clamp behind
    an addition, a second copy of a concatenation) belongs to the operator in front of it.
    """
    waiting: dict[tuple[int, str], list[str]] = {}
    for step in reversed(found):
        waiting.setdefault((step.instruction, step.traced), []).append(step.name)
    times: Counter[str] = Counter()
    current = found[0].name if found else ""
    for event in events:
        label = event.delegate_debug_id_str or event.name or ""
        if not (event.delegate_debug_id_str or label.startswith("native_call_")):
            continue  # the whole run, or a call that holds others
        traced = "native_call_" if label.startswith("native_call_") else label.partition(" (")[0]
        queue = waiting.get((event.instruction_id, traced), [])
        if queue:
            current = queue.pop()
        times[current] += (event.end_time - event.start_time) / 1e6
    return times
