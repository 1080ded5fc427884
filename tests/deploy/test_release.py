"""Stages that are compiled, run and measured side by side."""

from __future__ import annotations

import json
import math
import tempfile

import pytest
from nets import conv_norm, normal
from rows import AGREES, row

from slimkit.builtin.backends.reference import Reference
from slimkit.deploy.release import is_integer, release, verdicts
from slimkit.errors import ExportError
from slimkit.quantization.calibration import quantize

X = normal(4, 3, 8, 8)


def released(tmp_path, backend=None, **options):
    net = conv_norm().eval()
    small = quantize(net, [X], "torch").eval()
    stages = {"dense": {"torch": net}, "compressed": {"torch": net}, "int8": {"torch": small}}
    return release(
        stages, {"torch": backend or Reference()}, (X,), tmp_path / "exports", seconds=0, **options
    )


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
    with pytest.raises(ExportError, match="quantization saved nothing"):
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


def test_verdict_says_what_int8_takes() -> None:
    rows = [row(), row("compressed", ms=1.0), row("int8", ms=0.5)]
    assert verdicts(rows) == {"onnxruntime": "int8 takes 0.50 of the float time"}


def test_verdict_says_that_a_slower_int8_is_not_worth_it() -> None:
    rows = [row("compressed", ms=1.0), row("int8", ms=1.25)]
    assert verdicts(rows)["onnxruntime"].startswith(
        "int8 is not worth it here: it takes 1.25 of the float time; deploy the float file"
    )


def test_without_int8_there_is_no_verdict() -> None:
    assert verdicts([row(), row("compressed")]) == {}
