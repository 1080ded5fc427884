"""Whether int8 pays, what holds it back, and what would help."""

from __future__ import annotations

from rows import row

from slimkit.deploy.measurement import Latency
from slimkit.deploy.verdict import verdicts


def verdict(*rows) -> str:
    return verdicts(rows)["onnxruntime"]


def threads(ms: float) -> dict:
    return {"latency_all": Latency(ms, ms, 10), "threads": 4}


def test_verdict_says_what_int8_takes() -> None:
    rows = [row(), row("compressed", ms=1.0), row("int8", ms=0.5)]
    assert verdicts(rows) == {"onnxruntime": "int8 takes 0.50 of the float time"}


def test_verdict_says_what_int8_takes_on_all_threads_as_well() -> None:
    said = verdict(row("compressed", **threads(0.4)), row("int8", ms=0.5, **threads(0.3)))
    assert said == "int8 takes 0.50 of the float time (0.75 on 4 threads)"


def test_verdict_says_where_int8_pays_on_one_thread_only() -> None:
    said = verdict(row("compressed", **threads(0.2)), row("int8", ms=0.5, **threads(0.3)))
    assert said.startswith("int8 pays on one thread only: there it takes 0.50 of the float time")
    assert "on 4 threads 1.50" in said


def test_verdict_says_that_a_slower_int8_is_not_worth_it() -> None:
    assert verdict(row("compressed", ms=1.0), row("int8", ms=1.25)).startswith(
        "int8 is not worth it here: it takes 1.25 of the float time; deploy the float file"
    )


def test_without_int8_there_is_no_verdict() -> None:
    assert verdicts([row(), row("compressed")]) == {}


def test_a_float_precision_of_the_runtime_that_beats_int8_is_what_to_deploy() -> None:
    said = verdict(
        row("compressed", ms=1.0), row("compressed", ms=0.66, variant="bf16"), row("int8", ms=0.79)
    )
    assert said == (
        "the runtime's own bf16 takes 0.66 of the float32 time, less than int8 (0.79): deploy "
        "float with bf16"
    )


def test_a_float_precision_that_is_slower_than_int8_is_not_mentioned() -> None:
    bf16 = row("compressed", ms=0.66, variant="bf16")
    said = verdict(row("compressed", ms=1.0), bf16, row("int8", ms=0.5))
    assert said == "int8 takes 0.50 of the float time"


def test_without_int8_a_faster_precision_is_told() -> None:
    said = verdict(row("compressed", ms=1.0), row("compressed", ms=0.66, variant="bf16"))
    assert said == "the runtime's own bf16 takes 0.66 of the float32 time"


def test_the_dearest_float_operator_is_named_with_its_remedy() -> None:
    slow = {"QLinearConv": 0.4, "Sigmoid": 0.5, "Mul": 0.2, "Squeeze": 0.001}
    int8 = row("int8", ms=1.1, operator_ms=slow, operators={"QLinearConv": 5, "Sigmoid": 7})
    said = verdict(row("compressed", operator_ms={"FusedConv": 0.9}), int8)
    assert "float operators take 0.701 of 1.1 ms (64%): 7 Sigmoid 0.5 ms, Mul 0.2 ms" in said
    assert "ReLU6 or a clamp merge into the integer layer" in said
    assert "Squeeze" not in said


def test_integer_layers_that_are_no_faster_than_float_ones_are_named() -> None:
    int8 = row("int8", ms=1.1, operator_ms={"QLinearConv": 1.0, "QuantizeLinear": 0.05})
    said = verdict(row("compressed", operator_ms={"Conv": 0.9, "Relu": 0.1}), int8)
    assert "Its integer operators take 1 ms, the float file's layers 0.9 ms" in said
    assert "prune.round_to" in said
    assert "ReLU6" not in said


def test_an_int8_file_that_pays_well_needs_no_advice() -> None:
    slow = {"QLinearConv": 0.2, "Sigmoid": 0.3}
    said = verdict(row("compressed"), row("int8", ms=0.5, operator_ms=slow))
    assert said == "int8 takes 0.50 of the float time"


def test_where_the_runtime_tells_no_times_float_operators_are_counted() -> None:
    operators = {"Convolution int8": 12, "Swish": 11, "Concat": 3, "Split": 20}
    said = verdict(row("compressed"), row("int8", ms=0.9, operators=operators))
    assert "Beside 12 integer operators its file executes in float: 11 Swish, 3 Concat" in said
    assert "Split" not in said
