"""A network and the file that a backend makes of it, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkit
from slimkit.interfaces import Backend, Deployable, Runner, tensors_of
from slimkit.quantization.exact import exact
from slimkit.quantization.finished import finish


@dataclass
class Case:
    """A network as it was compiled, samples for it, and the folder of its file."""

    engine: Backend
    model: nn.Module
    inputs: tuple[Tensor, ...]
    deployable: Deployable
    directory: Path

    def run(self) -> Runner:
        return self.engine.load(self.directory)

    def operators(self) -> dict[str, int]:
        return self.engine.operators(self.directory)

    def outputs(self) -> list[Tensor]:
        """All outputs of the file for all samples."""
        return self._one_by_one(self.run())

    def expected(self) -> list[Tensor]:
        """The same of the float model or the simulation."""
        return self._one_by_one(self.model)

    def exact(self) -> list[Tensor]:
        """The same of the float model or the simulation on integers."""
        return self._one_by_one(exact(self.model, tuple(x[:1] for x in self.inputs)))

    def compared(self) -> tuple[Tensor, Tensor]:
        """The first output, as expected and by the file."""
        return self.expected()[0], self.outputs()[0]

    @torch.no_grad()
    def _one_by_one(self, run: Callable[..., Any]) -> list[Tensor]:
        """Files take one sample at a time."""
        samples = zip(*(x.split(1) for x in self.inputs), strict=True)
        found = [tensors_of(run(*sample)) for sample in samples]
        return [torch.cat(column) for column in zip(*found, strict=True)]


def case(
    engine: Backend, net: nn.Module, *inputs: Tensor, directory: Path, quantized: bool = True
) -> Case:
    """The network in int8, or else in float, compiled into `directory`."""
    net = net.eval()
    if quantized:
        net = slimkit.quantize(net, [inputs], backend=engine, activations="minmax").eval()
    deployable = finish(net, tuple(x[:1] for x in inputs))
    directory.mkdir(exist_ok=True)
    engine.compile(deployable, directory)
    return Case(engine, net, inputs, deployable, directory)


def fixtures(
    engine: Backend, nets: Mapping[str, tuple[Callable[[], nn.Module], Tensor]]
) -> tuple[Any, Any, Any]:
    """`name`, `int8` and `dense` of a test file: each of `nets`, and all of them compiled, once."""

    def cases(folder: Path, quantized: bool) -> dict[str, Case]:
        torch.manual_seed(0)
        return {
            name: case(engine, net(), x, directory=folder / name, quantized=quantized)
            for name, (net, x) in nets.items()
        }

    @pytest.fixture(scope="module", params=nets)
    def name(request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture(scope="module")
    def int8(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
        return cases(tmp_path_factory.mktemp("int8"), quantized=True)

    @pytest.fixture(scope="module")
    def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
        return cases(tmp_path_factory.mktemp("float"), quantized=False)

    return name, int8, dense


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to noise in decibels."""
    noise = (reference - other).double().square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(reference.double().square().sum() / noise))
