"""Files of the executorch backend compute what torch and the simulation compute, on integers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import Case, case, fixtures
from executorch_nets import (
    Attention,
    Functions,
    Ghost,
    Leaves,
    Mixed,
    Overwriting,
    Padded,
    Shuffle,
    Unknown,
)
from nets import Two, normal, pixels
from torch import Tensor, nn

import slimkit
from slimkit.deploy.agreement import compare
from slimkit.deploy.preflight import preflight
from slimkit.errors import ExportError
from slimkit.quantization.finished import finish

pytest.importorskip("executorch", reason="needs executorch: `make test-slow` has an environment")
backend = pytest.importorskip("slimkit_executorch.backend")
inspection = pytest.importorskip("slimkit_executorch.inspection")
ExecuTorch, Loaded = backend.ExecuTorch, inspection.Loaded

NETS = {
    "mixed": (Mixed, normal(16, 3, 24, 24)),
    "padded": (Padded, pixels(16, 3, 32, 32)),
    "attention": (Attention, normal(8, 12, 32)),
    "shuffle": (Shuffle, normal(8, 16, 12, 12)),
    "leaves": (Leaves, normal(8, 16, 12, 12)),
    "functions": (Functions, normal(8, 8, 8, 8)),
    "ghost": (Ghost, normal(8, 3, 16, 16)),
}
name, int8, dense = fixtures(ExecuTorch(), NETS)


def test_a_float_file_computes_what_torch_computes(dense: dict[str, Case], name: str) -> None:
    for found, expected in zip(dense[name].outputs(), dense[name].expected(), strict=True):
        tolerance = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert not any("int8" in operator for operator in dense[name].operators())


def test_an_int8_file_computes_what_the_simulation_computes(
    int8: dict[str, Case], name: str
) -> None:
    agreement = compare(int8[name].expected(), int8[name].outputs())
    assert min(agreement.sqnr_db) >= 35
    assert agreement.close >= 0.995


def test_integers_equal_those_of_the_exact_simulation(int8: dict[str, Case], name: str) -> None:
    """Only the last scaling to float may round otherwise, and nothing by an integer step."""
    assert min(compare(int8[name].exact(), int8[name].outputs()).sqnr_db) >= 100


def test_layers_sums_products_and_concatenations_compute_on_integers(
    int8: dict[str, Case],
) -> None:
    found = int8["mixed"].operators()
    assert found["Convolution int8"] == 5
    assert found["ConvolutionDepthWise int8"] == found["InnerProduct int8"] == 1
    assert found["Add int8"] == found["Mul int8"] == found["Concat int8"] == 1
    assert found["MaxPool int8"] == 1
    assert found["ReduceMean int8"] == 2
    assert not {"Convolution", "ConvolutionDepthWise", "InnerProduct", "Add", "Clamp"} & set(found)


def test_a_function_between_two_roundings_is_a_table_of_bytes(int8: dict[str, Case]) -> None:
    assert int8["mixed"].operators()["Sigmoid int8"] == 1
    assert int8["functions"].operators()["HardSwish int8"] == 1
    assert int8["functions"].operators()["Gelu int8"] == 1


def test_operators_that_compute_in_float_are_named(int8: dict[str, Case]) -> None:
    assert {"AveragePool", "Quantize", "Dequantize"} <= set(int8["mixed"].operators())
    assert {"Tanh", "Exp", "Sqrt", "Div", "Mul"} <= set(int8["functions"].operators())
    assert "native_layer_norm" in int8["attention"].operators()


def test_layers_in_front_of_activations_in_place_compute_on_integers(tmp_path: Path) -> None:
    """As torchvision and timm write them: overwritten, joined and sliced."""
    torch.manual_seed(0)
    found = case(ExecuTorch(), Ghost(), normal(8, 3, 16, 16), directory=tmp_path).operators()
    assert found["Convolution int8"] + found["ConvolutionDepthWise int8"] == 7
    assert not {"Convolution", "ConvolutionDepthWise", "alias_copy", "_to_dim_order_copy"} & {
        *found
    }


@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_overwritten_and_read_again_is_not_lost(quantized: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Overwriting().eval()
    x = normal(8, 8, 6, 6)
    made = case(ExecuTorch(), net, x, directory=tmp_path, quantized=quantized)
    with torch.no_grad():
        wanted = [made.model(x.clone())]  # the simulation, or the network
    assert min(compare(wanted, made.outputs()).sqnr_db) >= (20 if quantized else 100)


def test_tables_are_foretold() -> None:
    """GELU and hard-swish between layers; not the hard-swish in front of a subtraction's SiLU."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Hardswish(), nn.Conv2d(16, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1),
        nn.SiLU(), nn.Hardswish(),
    )  # fmt: skip
    (_, found) = preflight(net.eval(), (normal(1, 3, 8, 8),), {"executorch": ExecuTorch()})
    assert [line.split(":")[0] for line in found.in_float] == [
        "silu, 1 call (5)",
        "hardswish, 1 call (6)",
    ]


def test_tables_are_in_the_file(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Hardswish(), nn.Conv2d(16, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1),
        nn.LeakyReLU(), nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 1), nn.Tanh(),
        nn.Conv2d(8, 8, 1),
    )  # fmt: skip
    found = case(ExecuTorch(), net, normal(8, 3, 8, 8), directory=tmp_path).operators()
    tables = {kind for kind in found if kind.endswith(" int8")} - {
        "Convolution int8",
        "Transpose int8",
    }
    assert tables == {
        f"{kind} int8" for kind in ("HardSwish", "Gelu", "LeakyReLU", "Sigmoid", "Tanh")
    }


def test_portable_kernels_are_named_before_training() -> None:
    for found in preflight(Attention(), (normal(1, 12, 32),), {"executorch": ExecuTorch()}):
        assert any(line.startswith("native_layer_norm, 1 call,") for line in found.remarks)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    for found in preflight(plain, (normal(1, 3, 8, 8),), {"executorch": ExecuTorch()}):
        assert not found.remarks


@pytest.mark.parametrize("kind", ["int8", "dense"])
def test_operators_are_those_that_the_runtime_traces(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    """But for a clamp behind a sum, the copies of one concatenation, and what XNNPACK merges."""
    made = request.getfixturevalue(kind)[name]
    data = (made.directory / backend.FILE).read_bytes()
    steps = inspection.steps(data, backend.FILE)
    program = Loaded(data, backend.FILE, traced=True)
    program(*(x[:1] for x in made.inputs))
    listed = Counter((step.instruction, step.label) for step in steps)
    (events,) = inspection.traced(program)
    found = Counter((event.instruction, event.label) for event in events)
    assert {label for _, label in listed - found} <= {"Static Reshape", "Constant Pad"}
    assert {label for _, label in found - listed} <= {"Clamp", "Copy"}


def test_last_layers_give_float_from_integers_where_xnnpack_can(int8: dict[str, Case]) -> None:
    found = int8["leaves"].operators()
    assert found["Convolution int8"] == 2  # the first, and one of the four last
    assert found["ConvolutionDepthWise"] == 1
    assert found["Convolution"] == 2  # grouped, and of one dimension behind a reshape


def test_paddings_and_moves_stay_integers(int8: dict[str, Case]) -> None:
    assert int8["padded"].operators()["Pad int8"] == 2
    found = int8["shuffle"].operators()
    assert found["Concat int8"] == 1
    assert found["Slice int8"] == 2
    assert not {"Slice", "Concat"} & set(found)


def test_pixels_half_way_between_integers_go_where_the_simulation_sends_them(
    tmp_path: Path,
) -> None:
    """Read through the identity: any other rounding of the input would be a whole step."""
    layer = nn.Conv2d(3, 3, 1, bias=False)
    layer.weight.data = torch.eye(3).view(3, 3, 1, 1)
    made = case(ExecuTorch(), layer, pixels(2, 3, 64, 64), directory=tmp_path)
    step = made.model.fake["input0"].qparams()[0].item()
    (found,), (expected,) = made.outputs(), made.expected()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * step)


@torch.no_grad()
def test_inputs_beyond_the_range_are_clipped_in_layers_that_give_float(tmp_path: Path) -> None:
    """Such a layer finds its input's range as it runs; it must find the simulation's."""
    x = normal(4, 16)
    torch.manual_seed(0)
    made = case(ExecuTorch(), nn.Linear(16, 5), x, directory=tmp_path)
    far = torch.cat([100 * x[:1], 0.01 * x[:1], -x[:1].abs()])
    run = ExecuTorch().load(tmp_path)
    found = torch.cat([run(row[None])[0] for row in far])
    assert min(compare([made.model(far)], [found]).sqnr_db) >= 90  # float32; a step: 40


@pytest.mark.parametrize("quantized", [True, False])
def test_several_inputs_and_named_outputs_keep_their_order_and_types(
    quantized: bool, tmp_path: Path
) -> None:
    x, y = normal(4, 8), normal(4, 8, seed=1)
    made = case(ExecuTorch(), Two(), x, y, directory=tmp_path, quantized=quantized)
    found = made.outputs()
    assert [t.dtype for t in found] == [torch.float32, torch.bool, torch.int64, torch.float32]
    torch.testing.assert_close(found, made.exact(), rtol=0, atol=1e-5)


def test_integer_weights_take_a_quarter_of_the_space(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), normal(4, 256)
    small, large = tmp_path / "int8" / backend.FILE, tmp_path / "float" / backend.FILE
    case(ExecuTorch(), net, x, directory=small.parent)
    case(ExecuTorch(), net, x, directory=large.parent, quantized=False)
    assert small.stat().st_size < 0.3 * large.stat().st_size
    integers = net[0].weight.detach()
    scale = integers.abs().amax(1, keepdim=True) / 127
    row = (integers / scale).round().to(torch.int8)[7].numpy().tobytes()
    assert row in small.read_bytes()
    assert row not in large.read_bytes()


def test_programs_on_other_numbers_of_threads_run_by_turns(int8: dict[str, Case]) -> None:
    made = int8["mixed"]
    one, two = (ExecuTorch().load(made.directory, threads=n) for n in (1, 2))
    expected = one(made.inputs[0][:1])[0]
    library = sys.modules["executorch.extension.pybindings.portable_lib"]
    for run, threads in ((two, 2), (one, 1), (two, 2)):
        assert torch.equal(run(made.inputs[0][:1])[0], expected)
        assert library._threadpool_get_thread_count() == threads


def test_a_thread_of_the_pool_is_a_thread_of_the_process(int8: dict[str, Case]) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the system does not list threads")
    made, counts = int8["mixed"], []
    for threads in (1, 3):
        ExecuTorch().load(made.directory, threads=threads)(made.inputs[0][:1])
        counts.append(len([*Path("/proc/self/task").iterdir()]))
    assert counts[1] - counts[0] == 2


ALONE = """
import sys
import numpy as np
import torch
from executorch.runtime import Runtime
file, data = sys.argv[1:]
method = Runtime.get().load_program(file).load_method("forward")
x = torch.from_numpy(np.load(data + "/in.npy"))
np.save(data + "/out.npy", method.execute([x])[0].numpy())
assert not {"slimkit", "slimkit_executorch"} & set(sys.modules)
"""


def test_the_file_runs_in_a_process_without_slimkit(int8: dict[str, Case], tmp_path: Path) -> None:
    made = int8["mixed"]
    np.save(tmp_path / "in.npy", made.inputs[0][:1].numpy())
    file = made.directory / backend.FILE
    subprocess.run([sys.executable, "-c", ALONE, file, tmp_path], check=True, cwd=tmp_path)
    out = torch.from_numpy(np.load(tmp_path / "out.npy"))
    torch.testing.assert_close(out, made.outputs()[0][:1], rtol=0, atol=0)


def test_the_profile_names_the_operators(int8: dict[str, Case]) -> None:
    made = int8["mixed"]
    times = ExecuTorch().profile(made.directory, (made.inputs[0][:1],))
    assert times.keys() == made.operators().keys()
    assert times["Convolution int8"] > 0


def test_slimkit_finds_exports_and_measures_it(tmp_path: Path) -> None:
    net, data = Padded().eval(), [pixels(8, 3, 32, 32)]
    small = slimkit.quantize(net, data, backend="executorch")
    artifact = slimkit.export(
        small, data[0], "executorch", directory=tmp_path / "artifact", data=data
    )
    assert artifact.agreement >= 0.995
    assert artifact.row.operators["Convolution int8"] == 2
    assert artifact.run(data[0]).shape == (8, 10)


WITHOUT = """
import sys
sys.modules["executorch"] = None  # importing it fails
from slimkit_executorch.backend import ExecuTorch
from slimkit.errors import UnavailableError
try:
    ExecuTorch().check(None)
except UnavailableError as error:
    print(error)
"""


def test_missing_package_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.stdout.startswith("the executorch backend needs executorch.exir: pip install")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.pte is missing: export again"):
        ExecuTorch().load(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_damaged_file_is_one_clear_error(
    int8: dict[str, Case], keep: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = (int8["mixed"].directory / backend.FILE).read_bytes()
    size = int(keep * len(whole)) if isinstance(keep, float) else keep
    (tmp_path / backend.FILE).write_bytes(whole[:size])
    with pytest.raises(ExportError, match=r"ExecuTorch cannot load model\.pte: \w"):
        ExecuTorch().load(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_images_may_lie_with_channels_last_in_memory(tmp_path: Path) -> None:
    """The example, the weights and what the file is run on; slices run in portable kernels."""

    class Halved(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x[:, :, ::2, ::2] * 2

    x = normal(4, 3, 8, 8).to(memory_format=torch.channels_last)
    net = Halved(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    made = case(ExecuTorch(), net.to(memory_format=torch.channels_last), x, directory=tmp_path)
    assert min(compare(made.exact(), made.outputs()).sqnr_db) >= 100


def test_inputs_that_do_not_fit_are_refused(int8: dict[str, Case]) -> None:
    run = int8["mixed"].run()
    x = normal(1, 3, 24, 24)
    with pytest.raises(ExportError, match="takes 1 inputs, 2 were given"):
        run(x, x)
    with pytest.raises(ExportError, match=r"of shape \(1, 3, 24, 24\), .* \(1, 4, 24, 24\) was"):
        run(normal(1, 4, 24, 24))
    with pytest.raises(ExportError, match=r"is torch.float32 .* torch.float64"):
        run(x.double())


def test_what_stands_in_the_way_is_said_in_a_sentence(int8: dict[str, Case]) -> None:
    (problem,) = ExecuTorch().check(finish(Unknown(), (torch.eye(3)[None],)))
    assert "cholesky" in problem
    assert "i0e" in problem
    assert ExecuTorch().check(int8["padded"].deployable) == []


def test_nothing_is_printed(
    int8: dict[str, Case], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = int8["padded"]
    ExecuTorch().compile(made.deployable, tmp_path)
    for threads in (1, 2):
        ExecuTorch().load(tmp_path, threads)(made.inputs[0][:1])
    ExecuTorch().operators(tmp_path)
    ExecuTorch().profile(tmp_path, (made.inputs[0][:1],))
    assert capfd.readouterr() == ("", "")
