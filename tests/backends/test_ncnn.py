"""The ncnn backend against torch, against integer arithmetic in numpy, and against ncnn itself."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import ncnn
import numpy as np
import pnnx
import pytest
import torch
import torch.nn.functional as F
from compiled import sqnr
from nets import normal
from quantized_programs import Layer, Round, deployable, simulate
from torch import Tensor, nn

from slimkit.builtin.backends.ncnn import Ncnn
from slimkit.builtin.backends.ncnn_model import read_param, write_param
from slimkit.errors import ExportError
from slimkit.interfaces import Deployable


class Rounded(nn.Sequential):
    """One layer behind a symmetric rounding of its input."""

    def __init__(self, *shape: int, bias: bool = True, **conv: object) -> None:
        super().__init__(Round(symmetric=True), Layer(*shape, bias=bias, **conv))


class Residual(nn.Module):
    def __init__(self, width: int = 16, rounded: type[nn.Module] = Rounded) -> None:
        super().__init__()
        self.stem = rounded(width, 3, 3, 3, padding=1)
        self.a = rounded(width, width, 3, 3, padding=1)
        self.b = rounded(width, width, 3, 3, padding=1, bias=False)
        self.narrow = rounded(2 * width, width, 3, 3, padding=1, stride=2)
        self.depth = rounded(2 * width, 1, 3, 3, padding=1, groups=2 * width)
        self.head = rounded(10, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = F.relu6(self.depth(F.relu(self.narrow(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def compiled(deployed: Deployable, directory: Path) -> Path:
    Ncnn().compile(deployed, directory)
    return directory


def run_with_defaults(directory: Path, x: Tensor) -> Tensor:
    """As anybody's program would run the files."""
    net = ncnn.Net()
    net.load_param(str(directory / "model.ncnn.param"))
    net.load_model(str(directory / "model.ncnn.bin"))
    mat = ncnn.Mat(x[0].contiguous().numpy())
    extractor = net.create_extractor()
    extractor.input("in0", mat)
    return torch.from_numpy(np.array(extractor.extract("out0")[1]))[None]


def integer_convolution(net: Rounded, x: Tensor) -> np.ndarray:
    """int32 accumulation in numpy, then one multiplication by the scales."""
    rounding, layer = net
    w = layer.w.numpy().astype(np.int32)
    if w.ndim == 2:
        w = w[:, :, None, None]
    conv = {"padding": 0, "stride": 1, "groups": 1, "dilation": 1} | layer.conv
    pad, step, groups, gap = (conv[k] for k in ("padding", "stride", "groups", "dilation"))
    q = np.clip(np.rint(x[0].numpy() / np.float32(rounding.scale)), -127, 127).astype(np.int32)
    q = q.reshape(q.shape[0], *(q.shape[1:] or (1, 1)))
    q = np.pad(q, ((0, 0), (pad, pad), (pad, pad)))
    height = (q.shape[1] - gap * (w.shape[2] - 1) - 1) // step + 1
    width = (q.shape[2] - gap * (w.shape[3] - 1) - 1) // step + 1
    total = np.zeros((w.shape[0], height, width), dtype=np.int32)
    for o in range(w.shape[0]):
        first = o // (w.shape[0] // groups) * w.shape[1]
        for i, r, c in np.ndindex(w.shape[1:]):
            rows = slice(r * gap, r * gap + step * height, step)
            columns = slice(c * gap, c * gap + step * width, step)
            total[o] += w[o, i, r, c] * q[first + i, rows, columns][:height, :width]
    scale = layer.scale.numpy().astype(np.float64) * rounding.scale
    out = total * scale[:, None, None]
    if layer.bias is not None:
        out = out + layer.bias.detach().numpy()[:, None, None]
    return out


CONVOLUTIONS = {
    "3x3": (partial(Rounded, 24, 16, 3, 3, padding=1), (16, 12, 12)),
    "3x3 wide enough for winograd": (partial(Rounded, 64, 64, 3, 3, padding=1), (64, 14, 14)),
    "without bias": (partial(Rounded, 16, 8, 3, 3, bias=False), (8, 9, 9)),
    "odd channels": (partial(Rounded, 5, 3, 3, 3, padding=1), (3, 7, 7)),
    "1x1": (partial(Rounded, 32, 16, 1, 1), (16, 8, 8)),
    "stride 2": (partial(Rounded, 16, 16, 3, 3, stride=2, padding=1), (16, 13, 13)),
    "dilated": (partial(Rounded, 16, 16, 3, 3, dilation=2, padding=2), (16, 13, 13)),
    "7x7": (partial(Rounded, 16, 3, 7, 7, stride=2, padding=3), (3, 20, 20)),
    "depthwise": (partial(Rounded, 16, 1, 3, 3, groups=16, padding=1), (16, 12, 12)),
    "depthwise of odd channels": (partial(Rounded, 7, 1, 3, 3, groups=7, padding=1), (7, 12, 12)),
    "grouped by 8": (partial(Rounded, 32, 8, 3, 3, groups=4, padding=1), (32, 10, 10)),
    "grouped by 3": (partial(Rounded, 8, 3, 3, 3, groups=2, padding=1), (6, 10, 10)),
    "depth multiplier": (partial(Rounded, 12, 1, 3, 3, groups=6), (6, 10, 10)),
    "linear": (partial(Rounded, 10, 32), (32,)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_integer_layers_compute_the_integers_of_the_program(name: str, tmp_path: Path) -> None:
    make, shape = CONVOLUTIONS[name]
    net, x = make(), normal(1, *shape)
    compiled(deployable(net, x), tmp_path)
    (out,) = Ncnn().load(tmp_path)(x)
    expected = torch.from_numpy(integer_convolution(net, x)).float().reshape(out.shape)
    assert sqnr(expected, out) > 80
    torch.testing.assert_close(Ncnn().load(tmp_path, threads=2)(x)[0], out)
    torch.testing.assert_close(run_with_defaults(tmp_path, x), out)


def test_largest_sums_are_exact_under_the_default_options_of_ncnn(tmp_path: Path) -> None:
    """ncnn's int8 winograd, which it would choose here, overflows at a third of these sums."""
    net = Rounded(64, 64, 3, 3, padding=1, bias=False)
    nn.init.constant_(net[1].weight, 0.5)
    x = torch.ones(1, 64, 12, 12)
    deployed = deployable(net, x)
    compiled(deployed, tmp_path)
    assert int(net[1].w.min()) == 127
    assert sqnr(simulate(deployed, x)[0], run_with_defaults(tmp_path, x)) > 80


@pytest.mark.parametrize("threads", [1, 2])
def test_residual_network_agrees_with_its_simulation(threads: int, tmp_path: Path) -> None:
    deployed = deployable(Residual(), normal(1, 3, 24, 24))
    compiled(deployed, tmp_path)
    run = Ncnn().load(tmp_path, threads)
    for seed in range(4):
        x = normal(1, 3, 24, 24, seed=seed)
        assert sqnr(simulate(deployed, x)[0], run(x)[0]) > 40


def test_operators_tell_integer_layers_from_float_ones(tmp_path: Path) -> None:
    compiled(deployable(Residual(), normal(1, 3, 24, 24)), tmp_path)
    counts = Ncnn().operators(tmp_path)
    assert counts["Convolution int8"] == 4
    assert counts["ConvolutionDepthWise int8"] == 1
    assert counts["InnerProduct int8"] == 1
    assert not {"Convolution", "ConvolutionDepthWise", "InnerProduct"} & counts.keys()


def test_float_network_agrees_with_torch(tmp_path: Path) -> None:
    deployed = deployable(Residual(), normal(1, 3, 24, 24), quantized=False)
    compiled(deployed, tmp_path)
    x = normal(1, 3, 24, 24, seed=5)
    (out,), (expected,) = Ncnn().load(tmp_path)(x), simulate(deployed, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not any("int8" in name for name in Ncnn().operators(tmp_path))


def test_int8_files_are_a_third_of_the_float_ones(tmp_path: Path) -> None:
    sizes = []
    for quantized in (True, False):
        directory = tmp_path / str(quantized)
        directory.mkdir()
        deployed = deployable(Residual(64), normal(1, 3, 24, 24), quantized=quantized)
        compiled(deployed, directory)
        sizes.append(sum(file.stat().st_size for file in directory.iterdir()))
    assert sizes[0] < sizes[1] / 3


class Mixed(nn.Module):
    """Some layers float, tokens through a linear layer, two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = Rounded(16, 3, 3, 3, padding=1)
        self.unrounded = nn.Conv2d(16, 16, 3, padding=1)
        self.tokens = Rounded(12, 16)
        self.last = Rounded(5, 16)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = F.silu(self.unrounded(F.relu(self.rounded(x))))
        tokens = self.tokens(F.gelu(x.flatten(2).transpose(1, 2)))
        return tokens, self.last(x.mean((2, 3)) + y)


def test_mixed_network_with_several_inputs_and_outputs(tmp_path: Path) -> None:
    inputs = (normal(1, 3, 8, 8), normal(1, 16))
    deployed = deployable(Mixed(), *inputs)
    compiled(deployed, tmp_path)
    outs, expected = Ncnn().load(tmp_path)(*inputs), simulate(deployed, *inputs)
    assert [out.shape for out in outs] == [(1, 64, 12), (1, 5)]
    for out, reference in zip(outs, expected, strict=True):
        assert sqnr(reference, out) > 40
    assert Ncnn().operators(tmp_path)["InnerProduct int8"] == 2


class Fork(nn.Module):
    """Two layers read the same tensor, each with a scale of its own, and a third one as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Rounded(8, 3, 3, 3, padding=1)
        self.b = Rounded(8, 3, 3, 3, padding=1)
        self.c = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 2 * self.b(x) + self.c(x)


class Pyramid(nn.Module):
    """Concatenation, pooling, upsampling and SiLU between rounded layers, as in detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Rounded(16, 3, 3, 3, padding=1)
        self.b = Rounded(16, 16, 3, 3, padding=1)
        self.c = Rounded(8, 32, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.silu(self.a(x))
        y = F.leaky_relu(self.b(F.max_pool2d(x, 2)), 0.1)
        x = torch.cat([x, F.interpolate(y, scale_factor=2.0)], 1)
        left, right = self.c(x).chunk(2, 1)
        return torch.sigmoid(left) * right, y


def test_detector_like_network_agrees_with_its_simulation(tmp_path: Path) -> None:
    deployed = deployable(Pyramid(), normal(1, 3, 16, 16))
    compiled(deployed, tmp_path)
    x = normal(1, 3, 16, 16, seed=1)
    outs, expected = Ncnn().load(tmp_path)(x), simulate(deployed, x)
    assert [out.shape for out in outs] == [(1, 4, 16, 16), (1, 16, 8, 8)]
    for out, reference in zip(outs, expected, strict=True):
        assert sqnr(reference, out) > 40
    assert Ncnn().operators(tmp_path)["Convolution int8"] == 3


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 16), Rounded(12, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(F.layer_norm(self.embedding(ids), (16,)))


def test_token_ids_and_linear_layers_without_any_convolution(tmp_path: Path) -> None:
    ids = torch.arange(6)[None]
    deployed = deployable(Tokens(), ids)
    compiled(deployed, tmp_path)
    (out,) = Ncnn().load(tmp_path)(ids)
    assert out.shape == (1, 6, 12)
    assert sqnr(simulate(deployed, ids)[0], out) > 40
    assert Ncnn().operators(tmp_path)["InnerProduct int8"] == 1


@pytest.mark.parametrize("first", [nn.LayerNorm(16), nn.ReLU()])
def test_a_first_layer_that_computes_in_place_neither_crashes_nor_changes_the_input(
    first: nn.Module, tmp_path: Path
) -> None:
    net, x = nn.Sequential(first, nn.Linear(16, 4)).eval(), normal(1, 6, 16)
    deployed = deployable(net, x)
    compiled(deployed, tmp_path)
    given = x.clone()
    (out,) = Ncnn().load(tmp_path)(given)
    assert torch.equal(given, x)
    assert sqnr(net(x).detach(), out) > 40


def test_one_tensor_may_be_rounded_for_several_layers(tmp_path: Path) -> None:
    net, x = Fork(), normal(1, 3, 8, 8)
    net.b[0].hi = 20.0
    deployed = deployable(net, x)
    compiled(deployed, tmp_path)
    assert sqnr(simulate(deployed, x)[0], Ncnn().load(tmp_path)(x)[0]) > 80
    assert Ncnn().operators(tmp_path)["Convolution int8"] == 2
    assert Ncnn().operators(tmp_path)["Convolution"] == 1


def test_only_the_needed_files_are_written_and_they_may_go_after_loading(tmp_path: Path) -> None:
    deployed = deployable(Residual(), normal(1, 3, 24, 24))
    compiled(deployed, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"model.ncnn.param", "model.ncnn.bin", "shapes.json"}
    x = normal(1, 3, 24, 24, seed=1)
    run = Ncnn().load(tmp_path)
    before = run(x)[0]
    for file in tmp_path.iterdir():
        file.unlink()
    torch.testing.assert_close(run(x)[0], before)


def test_param_files_survive_reading_and_writing(tmp_path: Path) -> None:
    compiled(deployable(Residual(), normal(1, 3, 24, 24)), tmp_path)
    text = (tmp_path / "model.ncnn.param").read_text()
    assert write_param(read_param(text)) == text


class Call(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_operation_that_ncnn_lacks_is_named() -> None:
    deployed = deployable(Call(lambda x: torch.cummax(x, 1)[0]), normal(1, 8, 4), quantized=False)
    (problem,) = Ncnn().check(deployed)
    assert "cummax" in problem


def test_crash_of_pnnx_tells_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "pnnx"
    program.write_text(
        "#!/bin/sh\necho '#### pass_level2'\necho aten::strange >&2\nkill -SEGV $$\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(pnnx, "EXEC_PATH", str(program))
    with pytest.raises(ExportError, match="crashed .SIGSEGV. in pass_level2.*aten::strange"):
        compiled(deployable(Rounded(4, 8), normal(1, 8)), tmp_path)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(ExportError, match="pip install ncnn"):
        Ncnn().load(tmp_path)


def test_batches_are_refused(tmp_path: Path) -> None:
    deployed = deployable(Rounded(4, 8), normal(2, 8))
    with pytest.raises(ExportError, match="batch size 1"):
        compiled(deployed, tmp_path)
    compiled(deployable(Rounded(4, 8), normal(1, 8)), tmp_path)
    with pytest.raises(ExportError, match=r"one sample of shape \(1, 8\), \(2, 8\) was given"):
        Ncnn().load(tmp_path)(normal(2, 8))


def test_rounding_that_ncnn_cannot_do_is_refused(tmp_path: Path) -> None:
    wrong_grid = nn.Sequential(Round(symmetric=False), Layer(4, 8))
    with pytest.raises(ExportError, match="-127..127 around 0"):
        compiled(deployable(wrong_grid, normal(1, 8)), tmp_path)
    wrong_place = nn.Sequential(Round(symmetric=True), nn.ReLU())
    with pytest.raises(ExportError, match="conv2d and linear only, not of relu"):
        compiled(deployable(wrong_place, normal(1, 8)), tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    compiled(deployable(Residual(), normal(1, 3, 24, 24)), tmp_path)
    (tmp_path / "model.ncnn.param").write_text("7767517\n1 1\nNoSuchLayer a 0 1 in0\n")
    with pytest.raises(ExportError, match="NoSuchLayer"):
        Ncnn().load(tmp_path)
    (tmp_path / "model.ncnn.bin").unlink()
    with pytest.raises(ExportError, match=r"model\.ncnn\.bin is missing"):
        Ncnn().load(tmp_path)


def test_importing_the_backend_imports_no_runtime() -> None:
    code = (
        "import sys, slimkit.builtin.backends.ncnn, slimkit.builtin.backends.onnxruntime;"
        "print([m for m in ('ncnn', 'pnnx', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_slice_of_everything_is_nothing(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x[:, :4]) + x[:, :, :, :]

    x = normal(1, 4, 6, 6)
    run = Ncnn().load(compiled(deployable(Whole(), x, quantized=False), tmp_path))
    torch.testing.assert_close(run(x)[0], F.relu(x) + x)
