"""The ONNX Runtime backend: what it executes, and how close it is to the simulation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from compiled import sqnr
from nets import normal
from quantized_programs import Layer, Round, deployable, simulate
from torch import Tensor, nn

import slimkit
from slimkit.builtin.backends import onnxruntime as backend
from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.errors import ExportError
from slimkit.interfaces import Deployable
from slimkit.onnx_sessions import _kernel_times


class Branches(nn.Module):
    """Layers whose input and output tensors are rounded, each once; a subclass says how they flow.

    ``self.r[i]`` are roundings; each layer is given as the rounding it reads, shape and options.
    """

    def __init__(self, roundings: int, *layers: tuple[int, tuple[int, ...], dict]) -> None:
        super().__init__()
        self.r = nn.ModuleList(Round() for _ in range(roundings))
        self.layers = nn.ModuleList(
            Layer(*shape, reads=self.r[reads], **conv) for reads, shape, conv in layers
        )


PAD = {"padding": 1}


class Residual(Branches):
    def __init__(self, width: int = 16) -> None:
        super().__init__(
            8,
            (0, (width, 3, 3, 3), PAD),
            (1, (width, width, 3, 3), PAD),
            (2, (width, width, 3, 3), PAD),
            (4, (2 * width, width, 3, 3), {"padding": 1, "stride": 2}),
            (5, (2 * width, 1, 3, 3), {"padding": 1, "groups": 2 * width}),
            (7, (10, 2 * width), {}),
        )
        self.last = Round()

    def forward(self, x: Tensor) -> Tensor:
        r, conv = self.r, self.layers
        x = r[1](F.relu(conv[0](r[0](x))))
        y = r[3](conv[2](r[2](F.relu(conv[1](x)))))
        x = r[4](F.relu(x + y))
        x = r[6](F.relu6(conv[4](r[5](F.relu(conv[3](x))))))
        return self.last(conv[5](r[7](F.adaptive_avg_pool2d(x, 1)).flatten(1)))


class Flow(Branches):
    """conv, then `function`, then rounded and conv again."""

    def __init__(self, function: object, channels: int = 16, rounded_after: bool = True) -> None:
        super().__init__(3, (0, (16, 8, 3, 3), PAD), (2 if rounded_after else 1,
            (8, channels, 3, 3), PAD))  # fmt: skip
        self.function, self.rounded_after, self.last = function, rounded_after, Round()

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.r[1](self.layers[0](self.r[0](x))))
        if self.rounded_after:
            x = self.r[2](x)
        return self.last(self.layers[1](x))


def compiled(deployed: Deployable, directory: Path) -> Path:
    OnnxRuntime().compile(deployed, directory)
    return directory


def differing(reference: Tensor, other: Tensor, step: float) -> tuple[float, float]:
    """Largest distance in steps of rounding, and the fraction of elements that are not equal."""
    steps = (reference - other).abs() / step
    return float(steps.max()), float((steps > 0.5).float().mean())


def test_residual_network_runs_on_integers_only(tmp_path: Path) -> None:
    compiled(deployable(Residual(), normal(1, 3, 32, 32)), tmp_path)
    counts = OnnxRuntime().operators(tmp_path)
    assert counts["QLinearConv"] == 5
    assert counts["QLinearAdd"] == 1
    assert counts["QLinearGlobalAveragePool"] == 1
    assert counts["QGemm"] == 1
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 1
    float_operators = {"Conv", "FusedConv", "Gemm", "Add", "Relu", "Clip", "ReduceMean"}
    assert not float_operators & counts.keys()


@pytest.mark.parametrize("threads", [1, 2])
def test_residual_network_agrees_with_its_simulation(threads: int, tmp_path: Path) -> None:
    net = Residual()
    deployed = deployable(net, normal(1, 3, 32, 32))
    run = OnnxRuntime().load(compiled(deployed, tmp_path), threads)
    outs, expected = [], []
    for seed in range(50):
        x = normal(1, 3, 32, 32, seed=seed)
        outs += run(x)
        expected += simulate(deployed, x)
    largest, fraction = differing(torch.cat(expected), torch.cat(outs), net.last.scale)
    assert largest < 1.01
    assert fraction <= 0.01  # a sum that falls between two integers may go either way
    assert sqnr(torch.cat(expected), torch.cat(outs)) >= 35


MOVES = {
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), 16),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), 16),
    "pad": (lambda x: F.pad(x, (1, 0, 1, 0)), 16),
    "chunk": (lambda x: x.chunk(2, 1)[1], 8),
    "split": (lambda x: x.split([4, 12], 1)[1], 12),
    "getitem": (lambda x: x[:, ::2, 1:], 8),
    "reshape": (lambda x: x.reshape(1, 2, 8, 12, 12).transpose(1, 2).flatten(1, 2), 16),
    "permute": (lambda x: x.permute(0, 1, 3, 2), 16),
    "unsqueeze and squeeze": (lambda x: x.unsqueeze(0).squeeze(0), 16),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moved_integers_stay_integers(name: str, tmp_path: Path) -> None:
    function, channels = MOVES[name]
    net, x = Flow(function, channels, rounded_after=False), normal(1, 8, 12, 12)
    deployed = deployable(net, x)
    (out,) = OnnxRuntime().load(compiled(deployed, tmp_path))(x)
    counts = OnnxRuntime().operators(tmp_path)
    assert counts["QLinearConv"] == 2
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 1
    largest, fraction = differing(simulate(deployed, x)[0], out, net.last.scale)
    assert largest < 1.01
    assert fraction <= 0.001


COMPUTED = {
    "add": (lambda x: x + x, "QLinearAdd"),
    "mul": (lambda x: x * x, "QLinearMul"),
    "cat": (lambda x: torch.cat([x, x], 1), "QLinearConcat"),
    "sigmoid": (torch.sigmoid, "QLinearSigmoid"),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), "QLinearLeakyRelu"),
    "softmax": (lambda x: x.softmax(-1), "QLinearSoftmax"),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3), "QLinearAveragePool"),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), "QLinearGlobalAveragePool"),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), "QLinearGlobalAveragePool"),
    "matmul": (lambda x: x @ x, "QLinearMatMul"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_operations_of_the_scheme_compute_on_integers(name: str, tmp_path: Path) -> None:
    function, operator = COMPUTED[name]
    net, x = Flow(function, 32 if name == "cat" else 16), normal(1, 8, 12, 12)
    deployed = deployable(net, x)
    (out,) = OnnxRuntime().load(compiled(deployed, tmp_path))(x)
    counts = OnnxRuntime().operators(tmp_path)
    assert counts[operator] == 1
    assert counts["QLinearConv"] == 2
    assert name in OnnxRuntime.scheme.operations
    assert sqnr(simulate(deployed, x)[0], out) >= 35


@pytest.mark.parametrize(
    ("activation", "name"),
    [(F.relu, "relu"), (F.relu6, "relu6"), (lambda x: F.hardtanh(x, -0.3, 0.5), "hardtanh")],
)
@pytest.mark.parametrize("high", [0.9, 9.0])
def test_activation_fuses_whatever_the_range_behind_it(
    activation: object, name: str, high: float, tmp_path: Path
) -> None:
    """A learned range need not end where the activation ends."""

    class Net(Branches):
        def __init__(self) -> None:
            super().__init__(2, (0, (16, 8, 3, 3), PAD))

        def forward(self, x: Tensor) -> Tensor:
            return self.r[1](activation(self.layers[0](self.r[0](x))))

    net, x = Net(), normal(1, 8, 12, 12)
    net.r[1].lo, net.r[1].hi = -0.1, high
    deployed = deployable(net, x)
    (out,) = OnnxRuntime().load(compiled(deployed, tmp_path))(x)
    counts = OnnxRuntime().operators(tmp_path)
    assert counts["QLinearConv"] == 1
    assert not {"Conv", "FusedConv"} & counts.keys()
    assert name in OnnxRuntime.scheme.fuses
    largest, fraction = differing(simulate(deployed, x)[0], out, net.r[1].scale)
    assert largest < 1.01
    assert fraction <= 0.001


def test_rounding_twice_is_done_twice(tmp_path: Path) -> None:
    net = nn.Sequential(Round(), nn.ReLU(), Round())
    deployed = deployable(net, normal(1, 64, seed=3))
    x = normal(1, 64)
    (out,) = OnnxRuntime().load(compiled(deployed, tmp_path))(x)
    torch.testing.assert_close(out, simulate(deployed, x)[0])


@pytest.mark.parametrize("shape", [(1, 24), (1, 7, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_run_on_integers(shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    net = Branches(2, (0, (10, 24), {"bias": bias}))
    net.forward = lambda x: net.r[1](net.layers[0](net.r[0](x)))
    deployed = deployable(net, normal(*shape))
    (out,) = OnnxRuntime().load(compiled(deployed, tmp_path))(normal(*shape))
    counts = OnnxRuntime().operators(tmp_path)
    assert counts.get("QGemm", 0) + counts.get("QLinearMatMul", 0) == 1
    assert not {"Gemm", "MatMul"} & counts.keys()
    assert differing(simulate(deployed, normal(*shape))[0], out, net.r[1].scale)[0] < 1.01


def test_float_network_agrees_with_torch(tmp_path: Path) -> None:
    deployed = deployable(Residual(), normal(1, 3, 32, 32), quantized=False)
    x = normal(1, 3, 32, 32, seed=5)
    (out,) = OnnxRuntime().load(compiled(deployed, tmp_path))(x)
    torch.testing.assert_close(out, simulate(deployed, x)[0], rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("Q") for name in OnnxRuntime().operators(tmp_path))


def test_int8_file_is_a_third_of_the_float_file(tmp_path: Path) -> None:
    sizes = []
    for quantized in (True, False):
        directory = tmp_path / str(quantized)
        directory.mkdir()
        compiled(deployable(Residual(32), normal(1, 3, 32, 32), quantized=quantized), directory)
        sizes += [file.stat().st_size for file in directory.iterdir()]
    assert len(sizes) == 2
    assert sizes[0] < sizes[1] / 3


def test_file_holds_nothing_superfluous_and_is_reproducible(tmp_path: Path) -> None:
    deployed = deployable(Residual(), normal(1, 3, 32, 32))
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        contents.append((compiled(deployed, tmp_path / name) / "model.onnx").read_bytes())
    assert contents[0] == contents[1]
    model = onnx.load_from_string(contents[0])
    onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    assert not any(node.doc_string or node.metadata_props for node in graph.node)
    assert not graph.value_info
    assert [tensor.name for tensor in graph.input] == ["x"]


class TwoOfEach(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": x + y, "larger": x > y}


def test_several_inputs_and_outputs_in_order(tmp_path: Path) -> None:
    inputs = (normal(1, 4), normal(1, 4, seed=1))
    deployed = deployable(TwoOfEach(), *inputs, quantized=False)
    total, larger = OnnxRuntime().load(compiled(deployed, tmp_path))(*inputs)
    torch.testing.assert_close(total, inputs[0] + inputs[1])
    assert torch.equal(larger, inputs[0] > inputs[1])
    with pytest.raises(ExportError, match="takes 2 inputs, 1 were given"):
        OnnxRuntime().load(tmp_path)(inputs[0])


def test_directory_may_go_after_loading(tmp_path: Path) -> None:
    deployed = deployable(Residual(), normal(1, 3, 32, 32))
    run = OnnxRuntime().load(compiled(deployed, tmp_path))
    before = run(normal(1, 3, 32, 32))[0]
    (tmp_path / "model.onnx").unlink()
    torch.testing.assert_close(run(normal(1, 3, 32, 32))[0], before)
    with pytest.raises(ExportError, match="is missing"):
        OnnxRuntime().load(tmp_path)


def test_weights_beyond_the_limit_lie_beside_the_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backend, "SINGLE_FILE_LIMIT", 1000)
    deployed = deployable(Residual(), normal(1, 3, 32, 32))
    run = OnnxRuntime().load(compiled(deployed, tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert OnnxRuntime().operators(tmp_path)["QLinearConv"] == 5
    x = normal(1, 3, 32, 32)
    assert sqnr(simulate(deployed, x)[0], run(x)[0]) >= 35


class Padded(Branches):
    """Two convolutions that read a padded tensor; one pads once more by itself."""

    def __init__(self, fill: float) -> None:
        super().__init__(2, (0, (4, 3, 3, 3), {"stride": 2}), (1, (4, 4, 3, 3), PAD))
        self.fill = fill
        self.last = Round()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](F.pad(self.r[0](x), (0, 1, 2, 1), value=self.fill)))
        return self.last(self.layers[1](F.pad(self.r[1](x), (1, 0, 0, 2))))


@pytest.mark.parametrize(("fill", "convolutions", "pads"), [(0.0, 2, 0), (1.0, 1, 1)])
def test_padding_with_zeros_belongs_to_its_convolution(
    fill: float, convolutions: int, pads: int, tmp_path: Path
) -> None:
    deployed = deployable(Padded(fill), normal(1, 3, 16, 16))
    run = OnnxRuntime().load(compiled(deployed, tmp_path))
    operators = OnnxRuntime().operators(tmp_path)
    assert (operators["QLinearConv"], operators.get("Pad", 0)) == (convolutions, pads)
    x = normal(1, 3, 16, 16)
    assert sqnr(simulate(deployed, x)[0], run(x)[0]) >= 50


@pytest.mark.parametrize("fill", [1.0, float("-inf")])
def test_padding_with_what_no_integer_stands_for_stays_exact(fill: float, tmp_path: Path) -> None:
    net, x = nn.Sequential(Round(), nn.ConstantPad1d(1, fill)), normal(1, 8, 4)
    deployed = deployable(net, x)
    (out,) = OnnxRuntime().load(compiled(deployed, tmp_path))(x)
    torch.testing.assert_close(out, simulate(deployed, x)[0])


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match="pip install onnxruntime"):
        OnnxRuntime().load(tmp_path)


class Cholesky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cholesky_ex(x)[0]


def test_operation_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    deployed = deployable(Cholesky(), torch.eye(3)[None], quantized=False)
    (problem,) = OnnxRuntime().check(deployed)
    assert "cholesky" in problem


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"cannot load .*model\.onnx"):
        OnnxRuntime().load(tmp_path)


def test_the_profile_tells_the_time_of_every_operator(tmp_path: Path) -> None:
    x = normal(1, 3, 16, 16)
    compiled(deployable(Residual(), x), tmp_path)
    times = OnnxRuntime().profile(tmp_path, (x,))
    assert times.keys() == OnnxRuntime().operators(tmp_path).keys()
    assert all(0 <= ms < 100 for ms in times.values())
    assert times["QLinearConv"] > times["QuantizeLinear"]


def test_the_profile_leaves_the_first_runs_out() -> None:
    def run(at: int, conv_us: int) -> list[dict[str, Any]]:
        kernel = {"name": "n_kernel_time", "ts": at + 1, "args": {"op_name": "Conv"}}
        return [{"name": "model_run", "ts": at}, {**kernel, "dur": conv_us}]

    events = [e for n in range(8) for e in run(100 * n, 9000 if n < 5 else 10 * n)]
    assert _kernel_times(events) == {"Conv": 0.06}


def test_what_was_checked_is_not_exported_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exported: list[Deployable] = []
    export = backend._export

    def counted(deployed: Deployable) -> Any:
        exported.append(deployed)
        return export(deployed)

    monkeypatch.setattr(backend, "_export", counted)
    runtime, deployed = OnnxRuntime(), deployable(Residual(), normal(1, 3, 32, 32))
    assert runtime.check(deployed) == []
    files = []
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        runtime.compile(deployed, tmp_path / name)
        files.append((tmp_path / name / "model.onnx").read_bytes())
    assert exported == [deployed, deployed]  # for the check, and for the second file
    assert files[0] == files[1]


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("values", [2, 3, 4, 49])
def test_a_softmax_is_right_however_long_its_rows_are(
    tmp_path: Path, values: int, axis: int
) -> None:
    """ONNX Runtime's integer one overflows where its output's steps are fine, gates of two too."""

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = Round(), Round()

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.before(x).softmax(axis))

    x = 0.2 * normal(1, *((values, 8) if axis == 1 else (8, values)))
    deployed = deployable(Even(), x)
    run = OnnxRuntime().load(compiled(deployed, tmp_path))
    assert "QLinearSoftmax" not in OnnxRuntime().operators(tmp_path)
    assert sqnr(simulate(deployed, x)[0], run(x)[0]) >= 50


def test_a_layer_that_is_called_again_has_its_integers_once_in_the_file(tmp_path: Path) -> None:
    class Again(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times, self.layer = times, nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.layer(x).relu()
            return x

    sizes, x = [], normal(1, 64, 8, 8)
    for times in (2, 5):
        torch.manual_seed(0)
        small = slimkit.quantize(Again(times).eval(), [x])
        folder = tmp_path / str(times)
        artifact = slimkit.export(small, x, directory=folder)
        assert artifact.agreement == 1
        sizes.append(artifact.size_bytes)
    assert sizes[1] < sizes[0] + 5000 < 2 * sizes[0]
