"""Files of the litert backend compute what torch and the simulation compute, on integers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import Case, case, fixtures, sqnr
from nets import Two, normal
from torch import Tensor, nn

pytest.importorskip("slimkit_litert", reason="`make test-slow` installs it in .venv-litert")
pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install ai-edge-litert")

from ai_edge_litert.interpreter import Interpreter, OpResolverType  # noqa: E402
from litert_nets import Layers, Mixed, Norm2d, Padded, Scaled, Strided  # noqa: E402
from slimkit_litert.backend import LiteRt  # noqa: E402

import slimkit  # noqa: E402
from slimkit.deploy.preflight import preflight  # noqa: E402
from slimkit.errors import ExportError  # noqa: E402
from slimkit.quantization.finished import finish  # noqa: E402
from slimkit.testing import networks  # noqa: E402

NETS = {
    "mixed": (Mixed, normal(16, 3, 32, 32)),
    "padded": (Padded, normal(16, 3, 32, 32)),
    "layers": (Layers, normal(4, 3, 32, 32)),
}
name, int8, dense = fixtures(LiteRt(), NETS)


def file_of(made: Case) -> Path:
    return made.directory / "model.tflite"


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
    assert (expected.flatten(1).argmax(1) == found.flatten(1).argmax(1)).double().mean() >= 0.995


@torch.no_grad()
def test_layers_equal_the_integer_simulation_to_the_last_bit(int8: dict[str, Case]) -> None:
    made = int8["layers"]
    found = made.compared()[1]
    wanted = made.exact()[0]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_kernels_without_xnnpack_agree(int8: dict[str, Case], name: str) -> None:
    """An independent reference: TFLite's own kernels, in fixed point, of the same file."""
    made = int8[name]
    plain = Interpreter(
        model_path=str(file_of(made)), experimental_op_resolver_type=OpResolverType.BUILTIN_REF
    )
    plain.allocate_tensors()
    found = []
    for n in range(len(made.inputs[0])):
        plain.set_tensor(plain.get_input_details()[0]["index"], made.inputs[0][n : n + 1].numpy())
        plain.invoke()
        found.append(torch.from_numpy(plain.get_tensor(plain.get_output_details()[0]["index"])))
    assert sqnr(made.compared()[1], torch.cat(found)) >= 30


def test_maxima_are_taken_of_integers(int8: dict[str, Case]) -> None:
    found = int8["padded"].operators()
    assert (found["PADV2 int8"], found["MAX_POOL_2D int8"]) == (1, 1)
    assert (found["QUANTIZE"], found["DEQUANTIZE"]) == (1, 1)


@pytest.mark.parametrize("name", ["convolutional", "residual"])
def test_only_borders_compute_in_float(name: str, tmp_path: Path) -> None:
    net, inputs = networks.made(name, 4)
    found = case(LiteRt(), net, inputs, directory=tmp_path).operators()
    floats = {operator: n for operator, n in found.items() if not operator.endswith(" int8")}
    assert floats == {"QUANTIZE": 1, "DEQUANTIZE": 1}


def test_a_padding_beside_another_reader_computes_on_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = case(LiteRt(), Strided(), normal(8, 3, 16, 16), directory=tmp_path)
    assert torch.equal(made.exact()[0], made.outputs()[0])
    found = LiteRt().operators(made.directory)
    assert found["CONV_2D int8"] == 4
    assert {kind for kind in found if not kind.endswith("int8")} == {"QUANTIZE", "DEQUANTIZE"}


def test_a_block_that_is_normalized_with_channels_last(tmp_path: Path) -> None:
    """litert-torch broadcast the sum over the wrong dimension, and refused."""
    torch.manual_seed(0)
    ends = nn.Conv2d(3, 12, 4, 4), nn.Conv2d(12, 4, 1)
    net = nn.Sequential(ends[0], Norm2d(12), Scaled(12), Scaled(12), Norm2d(12), ends[1])
    made = case(LiteRt(), net, normal(8, 3, 32, 32), directory=tmp_path)
    assert sqnr(*made.compared()) >= 35
    found = LiteRt().operators(made.directory)
    kinds = ("CONV_2D int8", "FULLY_CONNECTED int8", "ADD int8")
    assert [found[kind] for kind in kinds] == [4, 4, 2]


def test_what_is_computed_of_parameters_alone_is_rounded_once(tmp_path: Path) -> None:
    """litert-torch dropped the scale of a rounded view of a parameter: the file was noise."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Conv2d(12, 12, 1), nn.Parameter(torch.rand(12))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x) * self.scale.view(-1, 1, 1)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 4, 4), Scaled(), Scaled(), nn.Conv2d(12, 4, 1))
    made = case(LiteRt(), net, normal(8, 3, 32, 32), directory=tmp_path)
    assert torch.equal(made.exact()[0], made.outputs()[0])


def test_what_computes_in_float_is_named(int8: dict[str, Case]) -> None:
    said = LiteRt().remarks(int8["mixed"].deployable)
    assert [line.split(", ")[0] for line in said] == ["HARD_SWISH"]  # as XNNPACK has no other
    assert LiteRt().remarks(int8["layers"].deployable) == []


def test_preflight_says_it_before_training() -> None:
    floating, small = preflight(Mixed().eval(), (normal(1, 3, 32, 32),), {"litert": LiteRt()})
    assert not floating.remarks
    assert any(line.startswith("HARD_SWISH, 1 operator (") for line in small.remarks)


def test_transposes_stand_at_borders_only(int8: dict[str, Case], dense: dict[str, Case]) -> None:
    def transposes(made: Case) -> int:
        found = made.operators()
        return sum(n for operator, n in found.items() if operator.startswith("TRANSPOSE"))

    for cases in (int8, dense):
        assert transposes(cases["mixed"]) == 1  # of the image
        assert transposes(cases["padded"]) == 2  # of the image and of the output


def test_paddings_belong_to_their_layers(int8: dict[str, Case], dense: dict[str, Case]) -> None:
    """Those on one side only do with this stride, those on both sides of a depthwise layer not."""
    for cases, behind in ((int8, " int8"), (dense, "")):
        assert f"PAD{behind}" not in cases["padded"].operators()
        assert cases["mixed"].operators()[f"PAD{behind}"] == 1


def test_weights_are_int8_per_channel_and_biases_int32(int8: dict[str, Case]) -> None:
    interpreter = Interpreter(model_path=str(file_of(int8["layers"])))
    weights = [t for t in interpreter.get_tensor_details() if len(t["shape"]) == 4]
    (kernel,) = [t for t in weights if tuple(t["shape"]) == (48, 3, 3, 3)]
    assert kernel["dtype"] == np.int8
    steps = kernel["quantization_parameters"]
    assert (len(steps["scales"]), steps["quantized_dimension"]) == (48, 0)
    assert not steps["zero_points"].any()
    biases = [t for t in interpreter.get_tensor_details() if tuple(t["shape"]) == (48,)]
    assert {t["dtype"] for t in biases} == {np.int32}


def test_an_int8_file_is_smaller_and_constants_are_aligned(
    int8: dict[str, Case], dense: dict[str, Case]
) -> None:
    small, large = file_of(int8["layers"]), file_of(dense["layers"])
    assert small.stat().st_size < 0.3 * large.stat().st_size
    data = large.read_bytes()
    kernel = dense["layers"].model.b.weight.detach().permute(0, 2, 3, 1).contiguous()
    assert data.find(kernel.numpy().tobytes()) % 16 == 0


@pytest.mark.parametrize("quantized", [True, False])
def test_several_inputs_and_named_outputs_keep_their_order_and_types(
    quantized: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)  # no sum on the edge of two integers
    x, y = normal(4, 8), normal(4, 8, seed=1)
    made = case(LiteRt(), Two(), x, y, directory=tmp_path, quantized=quantized)
    found = made.outputs()
    assert [t.dtype for t in found] == [torch.float32, torch.bool, torch.int64, torch.float32]
    torch.testing.assert_close(found, made.expected(), rtol=0, atol=1e-5)


def test_integer_io_takes_and_gives_the_integers_themselves(tmp_path: Path) -> None:
    engine = LiteRt(integer_io=True)
    torch.manual_seed(0)
    made = case(engine, Mixed(), normal(8, 3, 32, 32), directory=tmp_path)
    interpreter = Interpreter(model_path=str(file_of(made)))
    ports = (interpreter.get_input_details()[0], interpreter.get_output_details()[0])
    assert [port["dtype"] for port in ports] == [np.int8, np.int8]
    fake = made.model.fake
    for port, quantizer in zip(ports, ("input0", "head:linear:0:out"), strict=True):
        size, zero = (value.item() for value in fake[quantizer].qparams())
        assert port["quantization"] == (pytest.approx(size, rel=1e-6), zero)
    expected, found = made.compared()
    assert sqnr(expected, found) >= 35
    inner = {"QUANTIZE": 3, "DEQUANTIZE": 3}  # around hard-swish, and two parts of a concatenation
    assert {k: n for k, n in engine.operators(tmp_path).items() if k in inner} == inner


def test_threads_change_no_integer(int8: dict[str, Case]) -> None:
    x = normal(1, 3, 32, 32, seed=2)
    one, two = (LiteRt().load(int8["layers"].directory, threads=n)(x)[0] for n in (1, 2))
    assert torch.equal(one, two)


ALONE = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
file, data = sys.argv[1:]
model = Interpreter(model_path=file)
model.allocate_tensors()
model.set_tensor(model.get_input_details()[0]["index"], np.load(data + "/in.npy"))
model.invoke()
np.save(data + "/out.npy", model.get_tensor(model.get_output_details()[0]["index"]))
assert not {"slimkit", "slimkit_litert", "torch", "litert_torch"} & set(sys.modules)
"""


def test_the_file_runs_in_a_process_without_slimkit(int8: dict[str, Case], tmp_path: Path) -> None:
    made = int8["mixed"]
    x = normal(1, 3, 32, 32, seed=3)
    np.save(tmp_path / "in.npy", x.numpy())
    subprocess.run([sys.executable, "-c", ALONE, file_of(made), tmp_path], check=True, cwd=tmp_path)
    out = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert torch.equal(out, made.run()(x)[0])


def test_the_same_model_gives_the_same_file(int8: dict[str, Case], tmp_path: Path) -> None:
    made = int8["mixed"]
    LiteRt().compile(made.deployable, tmp_path)
    assert (tmp_path / "model.tflite").read_bytes() == file_of(made).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]
    assert str(Path(__file__).parent).encode() not in file_of(made).read_bytes()


def test_the_profile_names_the_operators(int8: dict[str, Case]) -> None:
    made = int8["layers"]
    times = LiteRt().profile(made.directory, (made.inputs[0][:1],))
    assert times.keys() == made.operators().keys()
    assert times["CONV_2D int8"] == max(times.values())


def test_slimkit_finds_exports_and_measures_it(tmp_path: Path) -> None:
    net, data = Layers(64).eval(), [normal(8, 3, 32, 32)]
    small = slimkit.quantize(net, data, backend="litert")
    artifact = slimkit.export(small, data[0], "litert", directory=tmp_path / "artifact", data=data)
    assert artifact.agreement >= 0.995
    assert artifact.row.operators["CONV_2D int8"] == 3
    assert artifact.run(data[0]).shape == (8, 10)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.tflite is missing: export again"):
        LiteRt().load(tmp_path)


@pytest.mark.parametrize("damage", ["half", "end", "text"])
def test_damaged_file_is_refused(int8: dict[str, Case], damage: str, tmp_path: Path) -> None:
    whole = file_of(int8["mixed"]).read_bytes()
    content = {"half": whole[: len(whole) // 2], "end": whole[:-64], "text": b"no model" * 9}[
        damage
    ]
    (tmp_path / "model.tflite").write_bytes(content)
    with pytest.raises(ExportError, match=r"cannot load .*model\.tflite: it is damaged"):
        LiteRt().load(tmp_path)


class Cholesky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cholesky_ex(x)[0]


def test_what_stands_in_the_way_is_said_in_a_sentence(int8: dict[str, Case]) -> None:
    (problem,) = LiteRt().check(finish(Cholesky(), (torch.eye(3)[None],)))
    assert "cholesky" in problem
    assert LiteRt().check(int8["padded"].deployable) == []


WITHOUT = """
import sys
sys.modules["litert_torch"] = None  # importing it fails
import torch
from slimkit.quantization.finished import finish
from slimkit_litert.backend import LiteRt
try:
    LiteRt().check(finish(torch.nn.Linear(2, 2), (torch.ones(1, 2),)))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_missing_converter_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.stdout.startswith("UnavailableError the litert backend needs litert_torch: pip")
