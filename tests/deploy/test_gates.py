"""What a deployed file must reach."""

from __future__ import annotations

import dataclasses
import math

import pytest
from rows import AGREES, row

from slimkit.deploy.gates import judged, missed
from slimkit.deploy.release import Row
from slimkit.recipe import Gates

DENSE = row()


def misses(gates: Gates, rows: list[Row], **options: bool) -> list[str]:
    return missed(judged(gates, rows, **options))


@pytest.mark.parametrize(
    ("gate", "limit", "final"),
    [
        ("accuracy_drop", 0.01, {"metric": 0.88}),
        ("macs_ratio", 0.5, {"macs": 5100}),
        ("params_ratio", 0.5, {"parameters": 510}),
        ("size_ratio", 0.5, {"size_bytes": 2001}),
        ("latency_ratio", 0.5, {"ms": 0.51}),
        ("agreement", 0.99, {"agreement": dataclasses.replace(AGREES, top1=0.98)}),
    ],
)
def test_each_gate_is_missed_alone_and_named(gate: str, limit: float, final) -> None:
    (miss,) = misses(Gates(**{gate: limit}), [DENSE, row("int8", **final)])
    assert miss.startswith(f"{gate}: ")
    assert "onnxruntime" in miss


@pytest.mark.parametrize(
    ("gate", "limit", "final"),
    [
        ("accuracy_drop", 0.01, {"metric": 0.89}),
        ("macs_ratio", 0.5, {"macs": 5000}),
        ("params_ratio", 0.5, {"parameters": 500}),
        ("size_ratio", 0.5, {"size_bytes": 2000}),
        ("latency_ratio", 0.5, {"ms": 0.5}),
        ("agreement", 0.99, {"agreement": dataclasses.replace(AGREES, top1=0.99)}),
    ],
)
def test_a_gate_holds_at_its_limit(gate: str, limit: float, final) -> None:
    assert misses(Gates(**{gate: limit}), [DENSE, row("int8", **final)]) == []


def test_gates_that_are_not_asked_for_hold() -> None:
    assert misses(Gates(), [DENSE, row("int8", ms=99, metric=0, size_bytes=9**9)]) == []


def test_the_last_stage_is_judged() -> None:
    rows = [DENSE, row("compressed", size_bytes=9000), row("int8", size_bytes=1000)]
    assert misses(Gates(size_ratio=0.5), rows) == []


def test_each_runtime_is_judged_against_its_own_dense_file() -> None:
    rows = [row(ms=1.0), row("int8", ms=0.4), row(runtime="ncnn", ms=10.0)]
    rows.append(row("int8", runtime="ncnn", ms=9.0))
    (miss,) = misses(Gates(latency_ratio=0.5), rows)
    assert "0.9 on ncnn, at most 0.5" in miss


def test_a_metric_that_should_be_small_drops_when_it_grows() -> None:
    rows = [row(metric=1.0), row("int8", metric=1.5)]
    assert len(misses(Gates(accuracy_drop=0.1), rows, larger_is_better=False)) == 1
    assert misses(Gates(accuracy_drop=0.1), rows, larger_is_better=True) == []


@pytest.mark.parametrize("metric", [None, math.nan])
def test_a_metric_that_is_missing_or_nan_misses_the_gate(metric) -> None:
    (miss,) = misses(Gates(accuracy_drop=0.1), [DENSE, row("int8", metric=metric)])
    assert miss.startswith("accuracy_drop")


def test_every_gate_is_judged_with_what_was_measured() -> None:
    rows = [DENSE, row("int8", size_bytes=DENSE.size_bytes // 4)]
    size, latency = judged(Gates(size_ratio=0.3, latency_ratio=0.1), rows)
    assert (size.gate, size.value, size.limit, size.holds) == ("size_ratio", 0.25, 0.3, True)
    assert (latency.gate, latency.holds) == ("latency_ratio", False)
    assert misses(Gates(size_ratio=0.3, latency_ratio=0.1), rows) == [str(latency)]
