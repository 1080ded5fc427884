"""The reference backend is torch itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import normal
from quantized_programs import Layer, Round, deployable, simulate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimkit.builtin.backends.reference import Reference


@pytest.mark.parametrize("quantized", [True, False])
def test_file_gives_what_the_program_gives(quantized: bool, tmp_path: Path) -> None:
    net = nn.Sequential(Round(), Layer(8, 3, 3, 3), nn.ReLU(), Round())
    deployed = deployable(net, normal(1, 3, 9, 9), quantized=quantized)
    Reference().compile(deployed, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    run = Reference().load(tmp_path)
    (tmp_path / "model.pt2").rename(tmp_path / "gone")
    x = normal(1, 3, 9, 9, seed=1)
    torch.testing.assert_close(run(x), simulate(deployed, x), rtol=0, atol=0)


def test_threads_are_set_for_the_call_only(tmp_path: Path) -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    Reference().compile(deployable(Net(), normal(1, 3), quantized=False), tmp_path)
    run = Reference().load(tmp_path, threads=1)
    before = torch.get_num_threads()
    x = normal(1, 3)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(torch.get_num_threads())
            return func(*args, **(kwargs or {}))

    with Watch():
        run(x)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_operators_are_those_of_the_program(tmp_path: Path) -> None:
    net = nn.Sequential(Round(), Layer(8, 3, 3, 3))
    Reference().compile(deployable(net, normal(1, 3, 9, 9)), tmp_path)
    counts = Reference().operators(tmp_path)
    assert counts["aten.conv2d.default"] == 1
    assert counts["quantized_decomposed.quantize_per_tensor.default"] == 1
