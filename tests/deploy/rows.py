"""Measured rows with round numbers."""

from __future__ import annotations

from typing import Any

from slimkit.deploy.agreement import Agreement
from slimkit.deploy.measurement import Latency
from slimkit.deploy.release import Row

AGREES = Agreement(top1=1.0, sqnr_db=(40.0,), largest_difference=0.1, close=1.0, inputs=10)


def row(stage: str = "dense", runtime: str = "onnxruntime", ms: float = 1.0, **changed: Any) -> Row:
    values: dict[str, Any] = {
        "label": stage,
        "metric": 0.9,
        "parameters": 1000,
        "macs": 10000,
        "size_bytes": 4000,
        "agreement": AGREES,
        "operators": {},
    }
    return Row(stage, runtime=runtime, latency=Latency(ms, ms, 30), **{**values, **changed})
