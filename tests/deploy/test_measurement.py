"""Latency of deployed files, side by side."""

from __future__ import annotations

import itertools

import pytest

from slimkit.deploy import measurement
from slimkit.deploy.measurement import measure


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a runner works."""
    now = [0.0]
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])

    def works(*seconds: float):
        durations = itertools.cycle(seconds)

        def run(*_inputs):
            now[0] += next(durations)
            return []

        return run

    return works


def test_median_is_of_one_run_in_milliseconds(clock) -> None:
    found = measure({"a": clock(0.002), "b": clock(0.005)}, ())
    assert found["a"].median_ms == pytest.approx(2)
    assert found["b"].median_ms == pytest.approx(5)


def test_first_runs_do_not_count(clock) -> None:
    slow_start = itertools.chain([9.0] * 3, itertools.repeat(0.001))
    now = clock(0.0)

    def run(*inputs):
        del inputs
        clock(next(slow_start))()
        return now()

    assert measure({"a": run}, (), least_runs=10, most_runs=10)["a"].p95_ms == pytest.approx(1)


def test_p95_lies_above_the_median_where_some_runs_are_slow(clock) -> None:
    found = measure({"a": clock(*[0.001] * 9, 0.010)}, (), least_runs=100, most_runs=100)["a"]
    assert found.median_ms == pytest.approx(1)
    assert found.p95_ms == pytest.approx(10)


@pytest.mark.parametrize(("duration", "runs"), [(1.0, 30), (0.01, 100), (1e-6, 2000)])
def test_number_of_runs_fits_the_time_between_bounds(clock, duration: float, runs: int) -> None:
    assert measure({"a": clock(duration)}, (), seconds=1.0)["a"].runs == runs


def test_runners_take_turns() -> None:
    order = []

    def runner(name):
        return lambda: order.append(name)

    measure({"a": runner("a"), "b": runner("b")}, (), least_runs=20, most_runs=20)
    turns = [name for name, _ in itertools.groupby(order)]
    assert len(turns) == 2 + 2 * 10  # warm-up, then ten turns each


def test_runners_get_the_inputs() -> None:
    seen = []
    measure({"a": lambda *inputs: seen.append(inputs)}, (1, 2), least_runs=10, most_runs=10)
    assert set(seen) == {(1, 2)}


class Told:
    """A runner far away: calls take 50 ms, and 2 ms of them the runs themselves."""

    def __init__(self, call) -> None:
        self.call, self.asked = call, []

    def __call__(self, *inputs):
        return self.call()

    def times(self, inputs, runs):
        self.asked.append((inputs, runs))
        return [2.0] * runs


def test_a_runner_that_tells_its_times_is_not_timed_here(clock) -> None:
    told = Told(clock(0.050))
    found = measure({"there": told, "here": clock(0.005)}, (1,), seconds=1.0)
    assert found["there"] == measurement.Latency(2.0, 2.0, found["here"].runs)
    assert found["here"].median_ms == pytest.approx(5)
    assert found["here"].runs == 200  # what the slower of both can do in the time
    assert told.asked == [((1,), 1)] * 3 + [((1,), 20)] * 10
