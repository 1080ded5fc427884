"""What is said before training is what the runtimes do afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slimkit
from slimkit.builtin.backends.reference import Reference
from slimkit.deploy.deployed import compile_
from slimkit.deploy.preflight import preflight
from slimkit.errors import ExportError, QuantizationError, SlimkitError, UnavailableError
from slimkit.interfaces import Deployable
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
    assert slow.startswith("channels that are no multiple of 8 come out of 1 call (a):")  # not f


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


class Talking(Reference):
    """A backend that knows more than its scheme says."""

    def remarks(self, deployable: Deployable) -> list[str]:
        return ["norms run on the host"] if deployable.quantized else []


class Missing(Reference):
    """A backend whose runtime is not there."""

    def check(self, deployable: Deployable) -> list[str]:  # noqa: ARG002
        raise UnavailableError("the board is off")


def test_a_backend_says_more_of_its_files_itself() -> None:
    floating, integers = preflight(Mixed().eval(), IMAGE, {"talking": Talking()})
    assert (floating.remarks, integers.remarks) == ((), ("norms run on the host",))


def test_a_missing_runtime_is_one_targets_problem_and_not_the_next_ones() -> None:
    found = preflight(Mixed().eval(), IMAGE, {"missing": Missing(), "talking": Talking()})
    assert [f.problems for f in found] == [("the board is off",)] * 2 + [()] * 2


def test_backends_are_named_or_given_and_batches_are_one_sample() -> None:
    model, x = Mixed().train(), torch.randn(4, 3, 16, 16)
    found = slimkit.preflight(model, x, ["torch", Talking()])
    assert [f.backend for f in found][:2] == ["torch"] * 2
    assert found[3].backend.endswith(":Talking")
    assert str(found[3]).splitlines()[0].endswith(":Talking, int8: runs")
    assert str(found[3]).splitlines()[-1] == "  in the file: norms run on the host"
    assert model.training
    found = slimkit.preflight(model, x, quantized=False)
    assert found == slimkit.preflight(model, x, "onnxruntime", quantized=False)


def test_int8_that_saves_nothing_is_said() -> None:
    found = slimkit.preflight(Mixed().eval(), IMAGE, "torch")[1]
    assert not found.problems
    assert "  larger: " in str(found)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3)).eval()
    whole, small = slimkit.preflight(wide, IMAGE, "torch")
    assert whole.size_bytes > small.size_bytes > 0
    assert not small.larger


class Refusing(Reference):
    """A backend for which something else of slimkit fails than an export."""

    def check(self, deployable: Deployable) -> list[str]:  # noqa: ARG002
        raise QuantizationError("its scales are none")


class Stuttering(Reference):
    """A backend that fails when it is asked for more."""

    def remarks(self, deployable: Deployable) -> list[str]:  # noqa: ARG002
        raise ExportError("the converter is gone")


def test_a_failure_of_one_backend_is_its_own_problem() -> None:
    found = preflight(Mixed().eval(), IMAGE, {"bad": Refusing(), "half": Stuttering()})
    assert [f.problems for f in found[:2]] == [("its scales are none",)] * 2
    assert [(f.problems, f.remarks) for f in found[2:]] == [((), ("the converter is gone",))] * 2


def test_a_pattern_of_layers_is_one_pattern() -> None:
    (_, found) = preflight(Mixed().eval(), IMAGE, "onnxruntime", keep_float="c")
    assert any(line.startswith("conv2d, 1 call (c)") for line in found.in_float)
    assert not any("(a)" in line for line in found.in_float)


def test_what_is_nobodys_fault_but_the_callers_is_an_error() -> None:
    with pytest.raises(SlimkitError, match="minmx"):
        preflight(Mixed().eval(), IMAGE, weights="minmx")
    with pytest.raises(SlimkitError, match="Mixed does not run on the example inputs"):
        preflight(Mixed().eval(), torch.randn(1, 4, 16, 16))


def test_what_is_rounded_already_is_refused() -> None:
    small = quantize(Mixed().eval(), [IMAGE], "onnxruntime")
    with pytest.raises(SlimkitError, match="takes the float model"):
        slimkit.preflight(small, IMAGE)


def test_nothing_changes_in_the_model() -> None:
    model = Mixed().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    preflight(model, IMAGE, backends("onnxruntime"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training


PROJECT = """
import torch
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 4)
    )


class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return torch.fft.rfft(self.net(x)).abs()


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader([(torch.ones(3, 8, 8), i % 4) for i in range(8)], 4)

    val_dataloader = train_dataloader
"""
SILU = "nn.Conv2d(8, 8, 1), nn.SiLU()"
RECIPE = """
model: project_of_targets:{model}
data: project_of_targets:Data
task: classification
quantize: {{}}
export: [onnxruntime, ncnn]
"""


def test_a_recipe_that_rewrites_is_asked_about_what_comes_out(here, tmp_path: Path) -> None:
    (tmp_path / "project_of_targets.py").write_text(PROJECT.replace("nn.Conv2d(8, 8, 1)", SILU))
    recipe = RECIPE.format(model="net") + "rewrite: [silu-to-hardswish]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = here(tmp_path, "check", "recipe.yaml", "--targets", "--json")
    assert done.returncode == 0, done.stderr
    lines = [line for found in json.loads(done.stdout)["targets"] for line in found["in_float"]]
    assert not any(line.startswith("silu,") for line in lines)


@pytest.mark.parametrize(("model", "code"), [("net", 0), ("Fourier", 2)])
def test_the_command_asks_every_backend_and_trains_nothing(
    model: str, code: int, here, tmp_path: Path
) -> None:
    (tmp_path / "project_of_targets.py").write_text(PROJECT)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model))
    done = here(tmp_path, "check", "recipe.yaml", "--targets", "--json")
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)["targets"]
    assert [(f["backend"], f["kind"]) for f in found] == [
        ("onnxruntime", "float"),
        ("onnxruntime", "int8"),
        ("ncnn", "float"),
        ("ncnn", "int8"),
    ]
    assert any("group_norm" in line for line in found[1]["in_float"])
    assert [bool(f["problems"]) for f in found] == [False, False, code == 2, code == 2]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == [
        "project_of_targets.py",
        "recipe.yaml",
    ]


@pytest.mark.parametrize(
    ("flow", "backend"),
    [
        (lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5), "onnxruntime"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), "ncnn"),
        (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), "ncnn"),  # 10 pixels
    ],
    ids=["divisor", "circular", "ceil"],
)
def test_a_file_that_computes_something_else_is_refused(flow, backend, tmp_path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(flow(self.first(x)))

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(4, 3, 12, 12)
    for found in preflight(net, x, backend):
        (problem,) = found.problems
        assert "computes something else than the model: its output 0 has" in problem
    with pytest.raises(ExportError, match="computes something else than the model"):
        slimkit.export(net, x, backend, directory=tmp_path / "artifact")
    int8 = slimkit.quantize(net, [(x,)], backend)  # which alone tells less: it rounds
    with pytest.raises(ExportError, match="computes something else than the model"):
        slimkit.export(int8, x, backend, directory=tmp_path / "artifact")
    assert [*tmp_path.iterdir()] == []
