"""The reference backend: the exported program itself, run by torch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.interfaces import Backend, Deployable, Runner, tensors_of

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
        # torch.export.load needs the quantized_decomposed operators to be registered
        import torch.ao.quantization.fx._decomposed  # noqa: F401

        module = torch.export.load(directory / FILE).module()

        def run(*inputs: Tensor) -> list[Tensor]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    return tensors_of(module(*inputs))
            finally:
                torch.set_num_threads(before)

        return run

    def operators(self, directory: Path) -> dict[str, int]:
        """Counts of the ATen operators in the program; none of them computes on integers."""
        import torch.ao.quantization.fx._decomposed  # noqa: F401

        counts: dict[str, int] = {}
        for node in torch.export.load(directory / FILE).graph.nodes:
            if node.op == "call_function":
                counts[str(node.target)] = counts.get(str(node.target), 0) + 1
        return counts
