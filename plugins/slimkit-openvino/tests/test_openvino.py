"""Files of the openvino backend compute what torch and the simulation compute, on integers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import Case, case, fixtures, sqnr
from nets import Two, normal, pixels
from openvino_nets import Attention, Clipped, Depthwise, Detector, Residual, Shuffle
from slimkit_openvino import backend
from slimkit_openvino.backend import OpenVino
from torch import Tensor, nn

import slimkit
from slimkit.errors import ExportError
from slimkit.quantization.finished import finish

pytest.importorskip("openvino", reason="needs openvino: pip install openvino")

NETS = {
    "residual": (Residual, normal(16, 3, 32, 32)),
    "depthwise": (Depthwise, pixels(16, 3, 32, 32)),
    "attention": (Attention, normal(16, 12, 32)),
    "detector": (Detector, normal(8, 3, 32, 32)),
}
name, int8, dense = fixtures(OpenVino(), NETS)


def test_a_float_file_computes_what_torch_computes(dense: dict[str, Case], name: str) -> None:
    expected, found = dense[name].compared()
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert not any("int8" in operator for operator in dense[name].operators())


def test_an_int8_file_computes_what_the_simulation_computes(
    int8: dict[str, Case], name: str
) -> None:
    expected, found = int8[name].compared()
    assert sqnr(expected, found) >= 35
    near = (expected - found).abs() <= 0.01 * expected.abs().max()
    assert near.double().mean() >= 0.995


def test_the_sum_that_tells_the_width_is_computed_on_integers(monkeypatch) -> None:
    seen = []
    compile_model = backend._core().compile_model

    class Core:
        def compile_model(self, *given):
            seen.append(compile_model(*given))
            return seen[-1]

    monkeypatch.setattr(backend, "_core", Core)
    assert backend._weight_bits.__wrapped__() in (None, 7)
    kinds = [n.get_rt_info()["primitiveType"].astype(str) for n in nodes_of(seen[0])]
    assert any(kind.endswith("I8") and "1x1" in kind or "brgconv" in kind for kind in kinds), kinds


def nodes_of(compiled):
    return compiled.get_runtime_model().get_ordered_ops()


LAYERS = {"residual": (3, 1), "depthwise": (3, 1), "attention": (0, 4), "detector": (5, 0)}


@torch.no_grad()
def test_a_chain_of_layers_equals_the_integer_simulation(int8: dict[str, Case]) -> None:
    made = int8["depthwise"]
    simulated, found = made.compared()
    wanted = made.exact()[0]
    # where sums of floats are rounded once more or once less, and nowhere an integer step apart
    assert (wanted - found).abs().max() <= 1e-6 * found.abs().max()
    if OpenVino().weight_bits() is None:  # weights of 7 bits leave no sum between two integers
        assert (simulated - found).abs().max() > 1e-4 * found.abs().max()  # the one in float is


def test_every_layer_with_weights_computes_on_integers(int8: dict[str, Case], name: str) -> None:
    operators = int8[name].operators()
    found = tuple(operators.get(f"{kind} int8", 0) for kind in ("Convolution", "FullyConnected"))
    assert found == LAYERS[name]
    assert not {"Convolution", "FullyConnected"} & operators.keys()


def test_paddings_and_activations_belong_to_their_convolution(int8: dict[str, Case]) -> None:
    assert int8["depthwise"].operators().keys() <= {
        "Convolution int8",
        "FullyConnected int8",
        "Reduce",
        "Reorder int8",
        "Subgraph",  # rounds the input
    }


def test_pixels_half_way_between_integers_go_where_the_simulation_sends_them(
    tmp_path: Path,
) -> None:
    """Read through the identity: any other rounding of the input would be a whole step."""
    layer = nn.Conv2d(3, 3, 1, bias=False)
    layer.weight.data = torch.eye(3).view(3, 3, 1, 1)
    images = pixels(2, 3, 64, 64)
    made = case(OpenVino(), layer, images, directory=tmp_path)
    expected, found = made.compared()
    step = made.model.fake["input0"].qparams()[0].item()
    halves = (images / step).frac().abs()
    assert float((halves - 0.5).abs().max()) < 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * step)


def test_bounds_of_a_clip_are_not_rounded(tmp_path: Path) -> None:
    made = case(OpenVino(), Clipped(), normal(4, 16, 16, 16), directory=tmp_path)
    expected, found = made.compared()
    assert sqnr(expected, found) >= 70


def test_shuffled_channels_stay_integers_in_one_operator(tmp_path: Path) -> None:
    made = case(OpenVino(), Shuffle(), normal(4, 16, 16, 16), directory=tmp_path)
    expected, found = made.compared()
    operators = made.operators()
    assert sqnr(expected, found) >= 50
    assert operators["ShuffleChannels int8"] == 1
    assert not any(operator.startswith("Transpose") for operator in operators)


@pytest.mark.parametrize("quantized", [True, False])
def test_several_inputs_and_named_outputs_keep_their_order_and_types(
    quantized: bool, tmp_path: Path
) -> None:
    x, y = normal(4, 8), normal(4, 8, seed=1)
    made = case(OpenVino(), Two(), x, y, directory=tmp_path, quantized=quantized)
    found = made.outputs()
    assert [t.dtype for t in found] == [torch.float32, torch.bool, torch.int64, torch.float32]
    torch.testing.assert_close(found, made.expected(), rtol=0, atol=1e-5)


ALONE = """
import sys
import numpy as np
import openvino
file, data = sys.argv[1:]
model = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save(data + "/out.npy", model([np.load(data + "/in.npy")])[0])
assert not {"slimkit", "slimkit_openvino", "torch"} & set(sys.modules)
"""


def test_the_file_runs_in_a_process_without_slimkit(int8: dict[str, Case], tmp_path: Path) -> None:
    made = int8["residual"]
    x = normal(1, 3, 32, 32, seed=3)
    np.save(tmp_path / "in.npy", x.numpy())
    file = made.directory / "model.xml"
    subprocess.run([sys.executable, "-c", ALONE, file, tmp_path], check=True, cwd=tmp_path)
    out = torch.from_numpy(np.load(tmp_path / "out.npy"))
    torch.testing.assert_close(out, made.run()(x)[0])


def test_integer_weights_take_a_quarter_of_the_space(
    int8: dict[str, Case], dense: dict[str, Case]
) -> None:
    small, large = (c["residual"].directory / "model.bin" for c in (int8, dense))
    assert small.stat().st_size < 0.3 * large.stat().st_size


def test_no_shape_of_a_convolution_is_left_to_be_computed(int8: dict[str, Case]) -> None:
    for name in ("residual", "depthwise", "detector"):
        text = (int8[name].directory / "model.xml").read_text()
        assert 'type="FakeQuantize"' in text
        assert 'type="ShapeOf"' not in text


def test_the_profile_names_the_operators(int8: dict[str, Case]) -> None:
    made = int8["residual"]
    times = OpenVino().profile(made.directory, (made.inputs[0][:1],))
    assert times.keys() == made.operators().keys()
    assert times["Convolution int8"] > 0


def test_bfloat16_is_near_and_not_equal(dense: dict[str, Case]) -> None:
    if "BF16" not in backend._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    x = normal(1, 3, 32, 32)
    exact, rounded, auto = (
        OpenVino(precision=p).load(dense["residual"].directory)(x)[0]
        for p in ("f32", "bf16", "auto")
    )
    assert 25 < sqnr(exact, rounded) < 80
    assert sqnr(exact, auto) > 25


def test_slimkit_finds_exports_and_measures_it(tmp_path: Path) -> None:
    net, data = Residual(64).eval(), [normal(8, 3, 32, 32)]
    small = slimkit.quantize(net, data, backend="openvino")
    artifact = slimkit.export(
        small, data[0], "openvino", directory=tmp_path / "artifact", data=data
    )
    assert artifact.agreement >= 0.995
    assert artifact.row.operators["Convolution int8"] == 3
    assert artifact.run(data[0]).shape == (8, 10)


def test_a_processor_without_bfloat16_is_named(
    dense: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = backend._core()

    class Old:
        read_model = core.read_model

        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(backend, "_core", Old)
    with pytest.raises(ExportError, match="has no bfloat16"):
        OpenVino(precision="bf16").load(dense["residual"].directory)


WITHOUT = """
import sys
sys.modules["openvino"] = None  # importing it fails
from slimkit_openvino.backend import OpenVino
from slimkit.errors import UnavailableError
try:
    OpenVino().check(None)
except UnavailableError as error:
    print(error)
"""


def test_missing_package_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.stdout.startswith("the openvino backend needs openvino: pip install")


def test_missing_file_is_named(int8: dict[str, Case], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.xml is missing: export again"):
        OpenVino().load(tmp_path)
    shutil.copy(int8["residual"].directory / "model.xml", tmp_path)
    with pytest.raises(ExportError, match=r"model\.bin is missing: export again"):
        OpenVino().load(tmp_path)


class Cholesky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cholesky_ex(x)[0]


def test_what_stands_in_the_way_is_said_in_a_sentence(int8: dict[str, Case]) -> None:
    (problem,) = OpenVino().check(finish(Cholesky(), (torch.eye(3)[None],)))
    assert "cholesky" in problem
    assert OpenVino().check(int8["depthwise"].deployable) == []


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


def test_a_model_that_openvino_misreads_is_refused_before_it_runs():
    (problem,) = OpenVino().check(finish(Spectrum(), (normal(1, 3, 14),)))
    assert "and the model (1, 3, 8): it has misread an operation" in problem
