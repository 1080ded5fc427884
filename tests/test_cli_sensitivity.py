"""`slimkit sensitivity`: the ranking on disk and on the terminal, and on after a crash."""

from __future__ import annotations

import csv
import json
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


def test_without_a_scan_named_it_says_what_there_is() -> None:
    with pytest.raises(SlimkitError, match="--quantize"):
        invoke("demo")
