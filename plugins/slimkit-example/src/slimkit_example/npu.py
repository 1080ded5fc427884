"""A backend for a processor that does not exist, with odd rules, as a vendor would write it.

The made-up NPU multiplies 8-bit integers, has shifts where others have multipliers, so that every
scale is a power of two, and computes 32 channels at a time. `npu_program` writes its file, and
`npu_interpreter` is what runs it here.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from slimkit.errors import ExportError
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme
from slimkit_example.npu_interpreter import Interpreter
from slimkit_example.npu_program import written

GRAPH, TENSORS = "model.json", "model.npz"


class MadeUpNpu(Backend):
    """Convolutions, linear layers and sums on 8-bit integers; the rest on the host in float.

    Activations and weights are int8 from -127 to 127, weights with a scale per output channel, and
    all scales are powers of two. Biases are 32-bit integers.
    """

    channel_multiple = 32
    scheme = Scheme(
        activations=Grid(bits=8, power_of_two=True),
        weights=Grid(bits=8, per_channel=True, power_of_two=True),
        operations=frozenset({"conv2d", "linear", "add", "iadd", "radd"}),
        placement="tensors",
        keeps=frozenset({"max_pool2d", "flatten", "reshape", "view", "transpose"}),
        fuses=frozenset({"batch_norm", "relu", "relu6"}),
        bias_bits=32,
        arithmetic="requantize",
    )

    def check(self, deployable: Deployable) -> list[str]:
        """What cannot be written into the NPU's file."""
        return written(deployable)[2]

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.json``, the steps, and ``model.npz``, the constants."""
        graph, tensors, problems = written(deployable)
        if problems:
            raise ExportError("the made-up NPU cannot run this model: " + "; ".join(problems))
        (directory / GRAPH).write_text(json.dumps(graph))
        np.savez(directory / TENSORS, **tensors)

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Read both files; the host's part runs on `threads` threads."""
        interpreter = _interpreter(directory)

        shapes = [tuple(x.shape) for x in interpreter.zeros()]

        def run(*inputs: Tensor) -> list[Tensor]:
            given = [tuple(x.shape) for x in inputs]
            if given != shapes:
                raise ExportError(f"{GRAPH} takes inputs of shape {shapes}, {given} were given")
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    return interpreter.run(inputs)
            finally:
                torch.set_num_threads(before)

        return run

    def operators(self, directory: Path) -> dict[str, int]:
        """Steps by name: those of the NPU have ``int8`` behind, the host's ``host``."""
        interpreter = _interpreter(directory)
        counts = Counter[str]()
        with torch.inference_mode():
            interpreter.run(interpreter.zeros(), counts)
        return dict(sorted(counts.items()))


def _interpreter(directory: Path) -> Interpreter:
    try:
        graph = json.loads((directory / GRAPH).read_text())
        with np.load(directory / TENSORS) as tensors:
            return Interpreter(graph, dict(tensors))
    except FileNotFoundError as error:
        raise ExportError(f"{error.filename} is missing: export again") from error
    except (ValueError, EOFError, BadZipFile) as error:
        raise ExportError(f"{directory} holds a damaged file: export again") from error
