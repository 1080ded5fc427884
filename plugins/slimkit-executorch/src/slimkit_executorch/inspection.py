"""What a ``.pte`` file executes, in which precision, and how long each operator takes."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimkit.errors import ExportError
from slimkit.silence import silenced
from slimkit_executorch.delegate import XnnGraph, graph_of
from slimkit_executorch.runtime import Loaded, bindings, part

_WARM_UP, _PROFILED = 5, 20  # runs
_KERNEL = "native_call_"  # begins the label of a portable kernel

_NODES = {
    "Conv2d": ("Convolution", "Convolution"),
    "DepthwiseConv2d": ("ConvolutionDepthWise", "Convolution"),
    "ConvTranspose2d": ("Deconvolution", "Deconvolution"),
    "FullyConnected": ("InnerProduct", "Fully Connected"),
    "BatchMatrixMultiply": ("MatMul", "Batch Matrix Multiply"),
    "Multiply": ("Mul", "Multiply"),
    "Subtract": ("Sub", "Subtract"),
    "Div": ("Div", "Divide"),
    "Gelu": ("Gelu", "GELU"),
    "Tanh": ("Tanh", "TanH"),
    "SquareRoot": ("Sqrt", "Square Root"),
    "ReciprocalSquareRoot": ("Rsqrt", "Reciprocal Square Root"),
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
"""Node of an XNNPACK graph -> what it is called here, and how XNNPACK's profiler begins its name.

To the profiler a table of bytes is an ``Invalid Unary Op``.
"""


@dataclass(frozen=True)
class Step:
    """One operator of a file.

    Args:
        name: what it is called here; ``int8`` behind where it computes on integers.
        label: how the tracer calls it, without types and numbers.
        instruction: the number of the program's instruction that it belongs to.
    """

    name: str
    label: str
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
            yield Step(_kernel(operator.name), _KERNEL, number)
        elif hasattr(call, "delegate_index"):
            blob = blobs[plan.delegates[call.delegate_index].processed.index].data
            yield from _nodes(graph_of(bytes(blob)), number)


def _kernel(name: str) -> str:
    """A portable kernel's name; those of quantized_decomposed convert as XNNPACK's own do."""
    plain = name.rpartition("::")[2]
    if name.startswith("quantized_decomposed::"):
        return "Dequantize" if plain.startswith("dequantize") else "Quantize"
    return plain


def _nodes(graph: XnnGraph, instruction: int) -> Iterator[Step]:
    for nodes in graph.steps():
        first, last = nodes[0], nodes[-1]
        reads, gives = graph.is_integer(first.reads[0]), graph.is_integer(last.gives)
        if len(nodes) > 1:
            inner = [node.kind for node in nodes if node.kind != "Convert"]
            name = _NODES.get(inner[-1], (inner[-1], ""))[0] if inner else "Requantize"
            yield Step(f"{name} int8", "Invalid Unary Op", instruction)
        elif graph.types[last.gives] == "qdint8" and any(
            node.is_linear and last.gives in node.reads for node in graph.nodes
        ):
            continue  # the layer behind it rounds what it reads itself
        elif first.kind == "Convert" and reads != gives:
            yield Step("Quantize" if gives else "Dequantize", "Convert", instruction)
        else:
            name, label = _NODES.get(first.kind, (first.kind, first.kind))
            label = "Fully Connected" if first.is_linear else label
            yield Step(f"{name} int8" if reads else name, label, instruction)


def portable(found: Sequence[Step]) -> list[str]:
    """What XNNPACK leaves to ExecuTorch's portable kernels, one sentence for each kernel."""
    counts = Counter(step.name for step in found if step.label == _KERNEL)
    return [
        f"{name}, {n} call{'s' if n > 1 else ''}, runs in a portable kernel of ExecuTorch, on one "
        "thread and unoptimized: XNNPACK did not take it; use another operation, or link that "
        "kernel on the device"
        for name, n in counts.most_common()
    ]


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
    runs = [_times(events, found) for events in traced(program)[_WARM_UP:]]
    names = sorted({step.name for step in found})
    return {name: statistics.median(run[name] for run in runs) for name in names}


@dataclass(frozen=True)
class Event:
    """What a trace says of one operator.

    Args:
        instruction: the number of the program's instruction that it belongs to.
        label: how the tracer calls it, without types and numbers.
        milliseconds: that it took.
    """

    instruction: int
    label: str
    milliseconds: float


def traced(program: Loaded) -> list[list[Event]]:
    """The operators of each run since a program was opened, in the order of their execution."""
    reader = part("devtools.etdump.serialize")
    with silenced():
        trace = reader.deserialize_from_etdump_flatcc(program.trace())
    runs = [run.events for run in trace.run_data if run.name == "Execute"]
    return [[*_events(event.profile_event for event in events)] for events in runs]


def _events(found: Iterable[Any]) -> Iterator[Event]:
    for event in found:
        within = event and event.delegate_debug_id_str
        if within:
            label = re.split(r" [(#]", within)[0]
        elif event and (event.name or "").startswith(_KERNEL):
            label = _KERNEL
        else:
            continue  # a whole run, or a call that holds others
        yield Event(event.instruction_id, label, (event.end_time - event.start_time) / 1e6)


def _times(events: Sequence[Event], found: Sequence[Step]) -> Counter[str]:
    """Milliseconds of one run by name.

    An event that begins no operator of the file (a clamp behind a sum, a second copy of a
    concatenation) belongs to the operator in front of it.
    """
    waiting: dict[tuple[int, str], list[str]] = {}
    for step in reversed(found):
        waiting.setdefault((step.instruction, step.label), []).append(step.name)
    times: Counter[str] = Counter()
    current = found[0].name if found else ""
    for event in events:
        queue = waiting.get((event.instruction, event.label), [])
        if queue:
            current = queue.pop()
        times[current] += event.milliseconds  # type: ignore[assignment]  # a counter of floats
    return times
