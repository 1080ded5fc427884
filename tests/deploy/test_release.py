"""Stages that are compiled, run and measured side by side."""

from __future__ import annotations

import json
import math
import tempfile

import pytest
import torch
from hungry import HungryReference
from models import conv
from nets import conv_norm, normal
from rows import AGREES, row
from torch import nn

from slimkit.builtin.backends.reference import Reference
from slimkit.deploy.gates import judged, missed
from slimkit.deploy.release import is_integer, release
from slimkit.errors import ExportError
from slimkit.quantization.calibration import quantize
from slimkit.recipe import Gates

X = normal(4, 3, 8, 8)


def released(tmp_path, backend=None, **options):
    net = conv_norm().eval()
    small = quantize(net, [X], "torch").eval()
    stages = {"dense": {"torch": net}, "compressed": {"torch": net}, "int8": {"torch": small}}
    return release(
        stages, {"torch": backend or Reference()}, (X,), tmp_path / "exports", seconds=0, **options
    )


def measured(tmp_path, backend=None):
    """All three stages of a net that is large enough for int8 to save something."""
    net = nn.Sequential(conv(3, 64), nn.ReLU(), conv(64, 64), nn.Flatten(2)).eval()
    small = quantize(net, [X], "torch").eval()
    stages = {"dense": {"torch": net}, "compressed": {"torch": net}, "int8": {"torch": small}}
    return release(stages, {"torch": backend or Reference()}, (X,), tmp_path / "e", seconds=0)


class AllFloat(Reference):
    """A runtime that reads int8 files and computes in float."""

    def operators(self, directory):
        return {"Conv": 3, "Dequantize": 2}


class Fat(Reference):
    """A runtime whose int8 files are as large as float ones."""

    def compile(self, deployable, directory):
        super().compile(deployable, directory)
        (directory / "padding").write_bytes(b"0" * 100_000 * int(deployable.quantized))


def test_an_int8_file_that_computes_nothing_in_int8_is_an_error(tmp_path) -> None:
    with pytest.raises(ExportError, match="torch would run the int8 file entirely in float"):
        released(tmp_path, AllFloat())


def test_an_int8_file_that_is_not_smaller_is_an_error(tmp_path) -> None:
    with pytest.raises(ExportError, match="quantization saves nothing"):
        released(tmp_path, Fat())


def test_only_the_last_stages_files_stay(tmp_path, monkeypatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    net = conv_norm().eval()
    stages = {"dense": {"torch": net}, "compressed": {"torch": net}}
    release(stages, {"torch": Reference()}, (X,), tmp_path / "exports", seconds=0)
    kept = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert kept == ["exports/torch/model.pt2"]


def test_rows_tell_the_deployed_files_numbers(tmp_path) -> None:
    net = conv_norm().eval()

    def evaluate(model) -> float:
        return float(model(X).shape[0])

    (found,) = release(
        {"dense": {"torch": net}},
        {"torch": Reference()},
        (X,),
        tmp_path / "e",
        evaluate=evaluate,
        seconds=0,
    )
    assert found.metric == 4  # the file is made for one sample; the batch went through it
    assert found.size_bytes == (tmp_path / "e" / "torch" / "model.pt2").stat().st_size
    assert found.macs == 8 * 27 * 64 + 8 * 16 * 5
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.agreement.inputs == 4
    assert found.agreement.largest_difference < 1e-5


def test_rows_become_strict_json() -> None:
    data = row(metric=math.nan, agreement=AGREES.__class__(None, (math.inf,), math.inf, 0.0, 1))
    found = json.loads(json.dumps(data.as_dict(), allow_nan=False))
    assert found["metric"] is None
    assert found["agreement"]["sqnr_db"] == [None]
    assert found["latency"]["median_ms"] == 1.0


@pytest.mark.parametrize("name", ["QLinearConv", "QGemm", "MatMulInteger", "Convolution int8"])
def test_integer_operators_are_known_by_name(name: str) -> None:
    assert is_integer(name)


@pytest.mark.parametrize("name", ["Conv", "QuantizeLinear", "DequantizeLinear", "Convolution"])
def test_other_operators_are_not_taken_for_integer_ones(name: str) -> None:
    assert not is_integer(name)


class Half(Reference):
    """A runtime with other float precisions, one of which this machine lacks."""

    float_variants = {"bf16": {"precision": "bf16"}, "fp8": {"precision": "fp8"}}

    def __init__(self, *, precision: str = "float32") -> None:
        self.precision = precision

    def check(self, deployable):
        return ["no such instructions here"] if self.precision == "fp8" else []

    def load(self, directory, threads=1):
        run = super().load(directory, threads)
        kind = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return lambda *inputs: [t.to(kind).float() for t in run(*inputs)]

    def profile(self, directory, inputs):
        return {"Conv": 1000.0 * len(inputs)}


def test_the_compressed_model_is_measured_in_the_runtimes_own_precisions_too(tmp_path) -> None:
    rows = measured(tmp_path, Half())
    assert [(r.stage, r.variant) for r in rows] == [
        ("dense", ""),
        ("compressed", ""),
        ("compressed", "bf16"),
        ("int8", ""),
    ]
    assert rows[2].label == "compressed, bf16"
    assert rows[1].agreement.sqnr_db[0] > 100 > rows[2].agreement.sqnr_db[0]


def test_a_precision_that_the_machine_lacks_is_noted_with_its_reason(tmp_path) -> None:
    compressed = measured(tmp_path, Half())[1]
    assert "no such instructions here" in compressed.unmeasured["fp8"]


def test_the_runtimes_profile_is_kept(tmp_path) -> None:
    assert measured(tmp_path, Half())[-1].operator_ms == {"Conv": 1000.0}


def test_a_measured_precision_is_not_what_gates_judge() -> None:
    rows = [row(), row("compressed", ms=0.4), row("compressed", ms=0.1, variant="bf16")]
    assert missed(judged(Gates(latency_ratio=0.3), rows))
    assert not missed(judged(Gates(latency_ratio=0.4), rows))


@pytest.mark.parametrize("threads", [1, 3])
def test_files_are_timed_on_all_threads_where_there_are_several(
    tmp_path, monkeypatch, threads: int
) -> None:
    opened = []

    class Counting(Reference):
        def load(self, directory, threads=1):
            opened.append(threads)
            return super().load(directory)

    monkeypatch.setattr("slimkit.deploy.release.usable_threads", lambda: threads)
    rows = measured(tmp_path, Counting())
    assert [r.threads for r in rows] == [threads] * 3
    assert {r.latency_all is None for r in rows} == {threads == 1}
    assert set(opened) == {1, threads}


@pytest.mark.parametrize("threads", [1, 5])
def test_a_device_has_threads_of_its_own(tmp_path, monkeypatch, threads: int) -> None:
    class Device(Reference):
        def threads(self):
            return threads

    monkeypatch.setattr("slimkit.deploy.release.usable_threads", lambda: 2)
    net = conv_norm().eval()
    models, backends = {"here": net, "there": net}, {"here": Reference(), "there": Device()}
    rows = release({"dense": models}, backends, (X,), tmp_path / "e", seconds=0)
    assert [(r.threads, r.latency_all is None) for r in rows] == [
        (2, False),
        (threads, threads == 1),
    ]


def test_peak_memory_is_measured(tmp_path, measuring_memory) -> None:
    net = conv_norm().eval()
    stages, backends = {"dense": {"torch": net}}, {"torch": HungryReference()}
    (found,) = release(stages, backends, (X,), tmp_path / "e", seconds=0)
    assert 50 * 2**20 < found.peak_bytes < 400 * 2**20
    assert found.unmeasured == {}


def test_a_missing_peak_has_its_reason(tmp_path, measuring_memory) -> None:
    class Local(Reference):
        """No other process can import this one."""

    found = measured(tmp_path, Local())[-1]
    assert found.peak_bytes is None
    assert "cannot be sent to another process" in found.unmeasured["peak memory"]
