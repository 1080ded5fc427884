"""`slimkit sensitivity`: the ranking on disk and on the terminal, and on after a crash."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from slimkit.cli.main import slimkit as command
from slimkit.errors import SlimkitError


def invoke(*arguments: str):
    return CliRunner().invoke(command, ["sensitivity", *arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("sklearn", reason="the demo's data")
    where = tmp_path_factory.mktemp("scan")
    result = invoke("demo", "--quantize", "-o", str(where), "--quiet")
    assert result.exit_code == 0, result.output
    assert "places; written:" in result.output
    return where


def test_everything_is_written_and_ordered(folder) -> None:
    plain = json.loads((folder / "onnxruntime.json").read_text())
    values = [row["sqnr_db"] for row in plain if row["sqnr_db"] is not None]
    assert values == sorted(values)
    assert {row["kind"] for row in plain} == {"activation", "weight"}
    with (folder / "onnxruntime.csv").open() as file:
        assert [row["place"] for row in csv.DictReader(file)] == [r["quantizer"] for r in plain]
    assert (folder / "onnxruntime.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_scan_goes_on_and_another_model_starts_over(folder, tmp_path, monkeypatch) -> None:
    lines = (folder / "onnxruntime.jsonl").read_text().splitlines()
    (tmp_path / "onnxruntime.jsonl").write_text("\n".join([*lines[:6], lines[6][:20]]))
    from slimkit.quantization import sensitivity

    scanned = []
    before = sensitivity.Observed.sqnr_db
    monkeypatch.setattr(sensitivity.Observed, "sqnr_db", lambda *a: scanned.append(1) or before(*a))
    result = invoke("demo", "--quantize", "-o", str(tmp_path), "--json")
    assert result.exit_code == 0
    assert len(scanned) == len(lines) - 1 - 5
    again = json.loads((tmp_path / "onnxruntime.json").read_text())
    assert again == json.loads((folder / "onnxruntime.json").read_text())
    scanned.clear()
    invoke("demo", "--quantize", "-o", str(tmp_path), "--samples", "2")
    assert len(scanned) == len(lines) - 1


RECIPE = """
model: {target: "slimkit.demo.digits:ResNet", options: {widths: [8, 12]}}
data: slimkit.demo.digits:digits
task: classification
prune: {criterion: l1, target: {flops: 0.5}}
trainer: {accelerator: cpu}
"""


def recipe(folder: Path, text: str = RECIPE) -> str:
    path = folder / "small.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def pruning(tmp_path_factory) -> Path:
    pytest.importorskip("sklearn", reason="the demo's data")
    where = tmp_path_factory.mktemp("pruning")
    result = invoke(recipe(where), "-o", str(where), "--quiet")
    assert result.exit_code == 0, result.output
    assert "6 groups, increase of the validation loss; written:" in result.output
    return where


def test_pruning_gives_a_row_for_each_coupled_group(pruning) -> None:
    with (pruning / "pruning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 7
    stage = [row for row in rows if row["group"] == "conv"]
    assert [float(row["ratio"]) for row in stage] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert {"stage1.0.conv2", "stage1.1.bn2"} <= set(stage[0]["layers"].split())
    assert not any(row["group"] == "stage1.0.conv2" for row in rows)
    plain = json.loads((pruning / "pruning.json").read_text())
    found = {(c["group"], p["ratio"]): p["increase"] for c in plain for p in c["points"]}
    assert found == {(r["group"], float(r["ratio"])): float(r["increase"]) for r in rows}
    assert (pruning / "pruning.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_pruning_scan_goes_on_and_other_options_start_over(
    pruning, tmp_path, monkeypatch
) -> None:
    lines = (pruning / "pruning.jsonl").read_text().splitlines()
    (tmp_path / "pruning.jsonl").write_text("\n".join([*lines[:6], lines[6][:20]]))
    from slimkit.pruning import sensitivity

    measured = []
    before = sensitivity._Worker.measured
    monkeypatch.setattr(
        sensitivity._Worker, "measured", lambda *a: measured.append(1) or before(*a)
    )
    result = invoke(recipe(tmp_path), "-o", str(tmp_path), "--json")
    assert result.exit_code == 0
    assert "5 results are known" in result.output
    assert len(measured) == len(lines) - 1 - 5
    for name in ("pruning.json", "pruning.csv"):
        assert (tmp_path / name).read_bytes() == (pruning / name).read_bytes()
    measured.clear()
    result = invoke(recipe(tmp_path), "-o", str(tmp_path), "--samples", "100")
    assert "is of another model, data or options: starting over" in result.output
    assert len(measured) == 12  # two batches of 64


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(tmp_path) -> None:
    pytest.importorskip("sklearn", reason="the demo's data")
    script = f"""
import os, signal
from slimkit.journal import Journal
add, count = Journal.add, []
def then_die(self, entry):
    add(self, entry)
    count.append(1)
    if len(count) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = then_die
from slimkit.cli.main import slimkit
slimkit(["sensitivity", {recipe(tmp_path)!r}, "-o", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL
    result = invoke(recipe(tmp_path), "-o", str(tmp_path))
    assert result.exit_code == 0
    assert "7 results are known" in result.output


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ([], RECIPE.replace("prune:", "quantize: {} #"), "no prune section: there is nothing to"),
        (["--backend", "ncnn"], RECIPE, "it needs --quantize"),
        (["--quantize", "--precision", "0.1"], RECIPE, "--precision is of the pruning scan"),
        ([], RECIPE.replace("flops: 0.5", "flops: 2"), "prune.target.flops"),
    ],
)
def test_what_cannot_be_scanned_is_said_at_once(tmp_path, arguments, text, message) -> None:
    with pytest.raises(SlimkitError, match=message):
        invoke(recipe(tmp_path, text), *arguments, "-o", str(tmp_path))


def test_help_and_checks_do_not_wait_for_torch(tmp_path) -> None:
    script = f"""
import sys
from slimkit.cli.main import slimkit
for given in (["--help"], [{recipe(tmp_path, RECIPE.replace("prune:", "quantize: {} #"))!r}]):
    try:
        slimkit(["sensitivity", *given], standalone_mode=False)
    except Exception as error:
        print(error)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prune.ratios: sensitivity" in done.stdout
    assert "no prune section" in done.stdout
