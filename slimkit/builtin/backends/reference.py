"""The reference backend: the exported program itself, run by torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.errors import ExportError
from slimkit.interfaces import Backend, Deployable, Runner, tensors_of
from slimkit.silence import silenced

FILE = "model.pt2"


class Reference(Backend):
    """Saves the program with `torch.export.save` and runs it with torch.

    Integer tensors are stored as integers but computed in float, so this file is small, not fast:
    it is what every other backend's output is compared with.
    """

    scheme = OnnxRuntime.scheme

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.pt2``."""
        torch.export.save(deployable.program, directory / FILE)

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Load the program; torch's own thread count is put back after every call."""
        program = _program(directory / FILE)
        module, count = program.module(), len(program.graph_signature.user_inputs)

        def run(*inputs: Tensor) -> list[Tensor]:
            if len(inputs) != count:
                raise ExportError(f"{FILE} takes {count} inputs, {len(inputs)} were given")
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    return tensors_of(module(*inputs))
            except AssertionError as error:  # by the guards of torch.export
                said = str(error).splitlines()[0].rstrip(".")
                raise ExportError(f"{FILE} does not run on these inputs: {said}") from error
            finally:
                torch.set_num_threads(before)

        return run

    def operators(self, directory: Path) -> dict[str, int]:
        """Counts of the ATen operators in the program; none of them computes on integers."""
        nodes = _program(directory / FILE).graph.nodes
        return dict(Counter(str(node.target) for node in nodes if node.op == "call_function"))


def _program(path: Path) -> torch.export.ExportedProgram:
    """The program in a file."""
    # torch.export.load needs the quantized_decomposed operators to be registered
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    if not path.is_file():
        raise ExportError(f"{path} is missing: export again")
    try:
        with silenced():
            return torch.export.load(path)
    except MemoryError:
        raise
    except Exception as error:  # errors of zip, JSON and keys, as the damage has it
        raise ExportError(f"torch cannot load {path}: it is damaged; export again") from error
