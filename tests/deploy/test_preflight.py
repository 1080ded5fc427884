"""What is said before training is what the runtimes do afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.deploy.deployed import compile_
from slimkit.deploy.preflight import preflight
from slimkit.errors import ExportError
from slimkit.quantization.calibration import quantize
from slimkit.registry import discover

IMAGE = (torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16),)


class Mixed(nn.Module):
    """Integer layers, a SiLU, a group norm, and channels of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 20, 3, 2, 1)
        self.b = nn.Conv2d(20, 20, 3, 1, 1, groups=20)
        self.c = nn.Conv2d(20, 32, 1)
        self.n = nn.GroupNorm(2, 32)
        self.f = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        x = self.n(self.c(self.b(x)))
        return self.f(x.mean((2, 3)))


class Fourier(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(super().forward(x)).abs()


class Deciding(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if out.sum() > 0 else -out


def backends(*names: str):  # noqa: ANN201
    return {name: discover().create("backend", name) for name in names}


def test_what_runs_in_float_is_named_with_reason_and_remedy() -> None:
    torch.manual_seed(0)
    floating, integers = preflight(Mixed().eval(), IMAGE, backends("ncnn"))
    assert (floating.kind, floating.problems, floating.in_float) == ("float", (), ())
    assert integers.problems == ()
    lines = "\n".join(integers.in_float)
    assert "conv2d, 1 call (b): the backend computes depthwise convolutions in float" in lines
    assert "group_norm, 1 call (n): not among what it computes in integers" in lines
    assert "silu, 1 call (the model)" in lines
    assert "linear" not in lines
    assert "flatten" not in lines
    (slow,) = integers.slow
    assert slow.startswith("2 calls (a, f) make channels that are no multiple of 8")


def test_a_rewrite_is_named_where_it_helps() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.silu(self.a(x)))

    (_, integers) = preflight(Gate().eval(), IMAGE, backends("ncnn"))
    scheme = backends("ncnn")["ncnn"].scheme
    helps = "hardswish" in scheme.operations | scheme.steps
    assert ("silu-to-hardswish" in "".join(integers.in_float)) is helps


@pytest.mark.parametrize("name", ["onnxruntime", "ncnn", "torch"])
@pytest.mark.parametrize("make", [Mixed, Fourier, Deciding])
def test_what_is_accepted_compiles_and_what_is_refused_does_not(
    name: str, make: type[nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    backend = backends(name)[name]
    floating, integers = preflight(model, IMAGE, {name: backend})
    tried = {"float": lambda: model, "int8": lambda: quantize(model, [IMAGE], backend)}
    for found in (floating, integers):
        try:
            compile_(tried[found.kind](), backend, IMAGE, tmp_path / found.kind)
        except ExportError:
            assert found.problems
        else:
            assert not found.problems


def test_nothing_changes_in_the_model() -> None:
    model = Mixed().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    preflight(model, IMAGE, backends("onnxruntime"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
