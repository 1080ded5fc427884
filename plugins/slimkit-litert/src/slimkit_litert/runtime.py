"""Runs a .tflite file: LiteRT's interpreter with XNNPACK, and what it executes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimkit.errors import ExportError
from slimkit.importing import required
from slimkit.silence import captured

FILE = "model.tflite"
_WARM_UP, _PROFILED = 3, 10  # runs


def read(directory: Path) -> bytes:
    """The file of an artifact.

    Raises:
        ExportError: it is not there.
    """
    try:
        return (directory / FILE).read_bytes()
    except FileNotFoundError as error:
        raise ExportError(f"{directory / FILE} is missing: export again") from error


def opened(data: bytes, name: str, threads: int = 1) -> Any:
    """An interpreter of a file, ready to run.

    XNNPACK computes what it has kernels for, in float and int8; LiteRT's own kernels do the rest.

    Raises:
        ExportError: it is no file of LiteRT's, is damaged, or holds an operator that does not run.
    """
    module = required("ai_edge_litert.interpreter", "litert", "ai-edge-litert")
    refused = f"LiteRT cannot load {name}"
    if not _is_whole(data):
        raise ExportError(f"{refused}: it is damaged or no .tflite file; export again")
    try:
        with captured():  # it announces its delegate
            interpreter = module.Interpreter(model_content=data, num_threads=threads)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"{refused}: {_first_line(error)}") from error
    return interpreter


def _is_whole(data: bytes) -> bool:
    """Whether all tables of the file can be read, which LiteRT does not look at before it runs."""
    from slimkit_litert.graph import Graph

    if data[4:8] != b"TFL3":
        return False
    try:
        graph = Graph(data)
        return all(graph.is_whole(tensor) for tensor in range(len(graph.graph.tensors)))
    except Exception:  # struct, index, memory and type errors, as the damage has it
        return False


class Port:
    """One input or output of a file, which may be integers where the model's is float.

    Args:
        details: as the interpreter gives them.
    """

    def __init__(self, details: Any) -> None:
        self.index = details["index"]
        self.shape = tuple(details["shape"])
        steps = details["quantization_parameters"]
        self.rounds = len(steps["scales"]) == 1
        if self.rounds:
            self.size = torch.tensor(float(steps["scales"][0]))
            self.zero = int(steps["zero_points"][0])

    def inward(self, x: Tensor) -> Any:
        """What the file reads."""
        x = x.detach().cpu()
        if self.rounds and x.is_floating_point():
            x = ((x * (1 / self.size)).round() + self.zero).clamp(-128, 127).to(torch.int8)
        return x.contiguous().numpy()

    def outward(self, values: Any) -> Tensor:
        """What the model gives."""
        x = torch.from_numpy(values)
        return (x.float() - self.zero) * self.size if self.rounds else x


def runner(interpreter: Any) -> Callable[..., list[Tensor]]:
    """Takes the model's inputs and gives its outputs."""
    inputs = [Port(details) for details in interpreter.get_input_details()]
    outputs = [Port(details) for details in interpreter.get_output_details()]

    def run(*tensors: Tensor) -> list[Tensor]:
        if len(tensors) != len(inputs):
            raise ExportError(f"{FILE} takes {len(inputs)} inputs, {len(tensors)} were given")
        try:
            for port, tensor in zip(inputs, tensors, strict=True):
                interpreter.set_tensor(port.index, port.inward(tensor))
            interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            said = _first_line(error)
            raise ExportError(f"{FILE} does not run on these inputs: {said}") from error
        return [port.outward(interpreter.get_tensor(port.index)) for port in outputs]

    return run


def operators(data: bytes) -> list[str]:
    """The type of each operator in order of execution; integer ones have ``int8`` behind."""
    from slimkit_litert.graph import Graph

    graph = Graph(data)
    return [named(graph, operator) for operator in graph.operators]


def named(graph: Any, operator: Any) -> str:
    """The operator's type, and whether it reads and writes integers."""
    kind: str = graph.kind(operator)
    tensors = [t for t in (*operator.inputs, *operator.outputs) if t >= 0]
    integer = any(graph.is_integer(t) for t in tensors) and not any(map(graph.is_float, tensors))
    return f"{kind} int8" if integer else kind


def times(data: bytes) -> dict[str, float]:
    """Milliseconds that the operators of each type take on one thread.

    The wheel has no profiler, so each operator runs in a file of its own: the median of 10 runs on
    zeros. What is lost is what operators share: caches, and copies that XNNPACK saves.
    """
    from slimkit_litert.graph import Graph

    found: dict[str, float] = defaultdict(float)
    for number, name in enumerate(operators(data)):
        alone = opened(Graph(data).alone(number), name)
        spent = []
        for turn in range(_WARM_UP + _PROFILED):
            start = time.perf_counter()
            alone.invoke()
            if turn >= _WARM_UP:
                spent.append(1000 * (time.perf_counter() - start))
        found[name] += statistics.median(spent)
    return dict(sorted(found.items()))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
