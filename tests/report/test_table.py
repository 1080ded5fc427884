"""The table of deployed files."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from slimkit.report.page import write_report
from slimkit.report.table import cells, footnote, headings, table, unmeasured

OLD = {
    "stage": "compressed",
    "label": "pruned + distilled",
    "runtime": "onnxruntime",
    "metric": 0.9972,
    "parameters": 251_000,
    "macs": 125_500_000,
    "size_bytes": 2_700_000,
    "latency": {"median_ms": 100.123, "p95_ms": 120.5, "runs": 30},
    "agreement": {
        "top1": 1.0,
        "sqnr_db": [40.0],
        "largest_difference": 0.1,
        "close": 1.0,
        "inputs": 360,
    },
    "operators": {"Conv": 3},
}
NEW: dict[str, Any] = {
    **OLD,
    "variant": "",
    "latency_all": {"median_ms": 50.5, "p95_ms": 60.0, "runs": 10},
    "threads": 8,
    "peak_bytes": 25 * 2**20,
    "operator_ms": {"Conv": 1.5, "Relu": 0.5},
    "unmeasured": {},
}


def value(row: dict[str, Any], heading: str) -> str:
    return dict(zip(headings("accuracy"), cells(row), strict=True))[heading]


def test_a_row_tells_the_time_on_all_threads_and_the_peak() -> None:
    assert value(NEW, "ms, all threads") == "50.500"
    assert value(NEW, "peak MiB") == "25.0"


def test_an_artifact_of_old_has_dashes_there() -> None:
    assert value(OLD, "ms, all threads") == value(OLD, "peak MiB") == "-"


def test_the_table_fits_120_columns_in_one_line_a_row() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table([NEW, {**NEW, "stage": "int8"}], "val_accuracy"))
    lines = capture.get().splitlines()
    assert len(lines) == 2 + 2  # two lines of headings
    assert max(map(len, lines)) <= 120


def test_the_footnote_counts_the_threads() -> None:
    assert "one thread, and on all 8." in footnote("test", 360, "accuracy", [NEW])
    assert footnote("test", 360, "accuracy", [OLD]).endswith("Latency: one sample, one thread.")
    board = {**NEW, "threads": 4}
    assert "and on all 4 or 8." in footnote("test", 360, "accuracy", [NEW, board, NEW])


def test_what_is_missing_is_said_once_with_all_its_files() -> None:
    lacking = {**NEW, "unmeasured": {"peak memory": "it ran longer than 60 s"}}
    (said,) = unmeasured([lacking, {**lacking, "runtime": "ncnn"}, NEW, OLD])
    assert said == (
        "peak memory was not measured of pruned + distilled on onnxruntime, pruned + distilled on "
        "ncnn: it ran longer than 60 s"
    )


@pytest.mark.parametrize("row", [OLD, NEW])
def test_the_page_is_written_of_old_and_new_rows(tmp_path, row) -> None:
    metrics = {
        "metric": {"name": "accuracy"},
        "data": "test",
        "rows": [row, {**row, "stage": "int8"}],
        "verdicts": {"onnxruntime": "int8 takes 0.50 of the float time"},
        "missed": [],
        "pruning": None,
    }
    plugin = {"kind": "loss", "name": "far", "package": "slimkit-faraway", "version": "4.5"}
    write_report(tmp_path / "report.html", metrics, "model: x\n", [plugin])
    page = (tmp_path / "report.html").read_text()
    assert ("Where the time goes" in page) == (row is NEW)
    assert "No gate was missed." in page
    gate = {"gate": "size_ratio", "runtime": "ncnn", "value": 0.26, "limit": 0.3, "holds": True}
    write_report(tmp_path / "gated.html", {**metrics, "gates": [gate]}, "model: x\n", [plugin])
    assert "size_ratio 0.26 on ncnn (limit 0.3)." in (tmp_path / "gated.html").read_text()
    assert "<td>far</td><td>slimkit-faraway</td><td>4.5</td>" in page
    assert ("Conv 1.500 (75 %)" in page) == (row is NEW)
