"""Measures how long deployed files take, side by side in one process, or where they run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from slimkit.interfaces import Runner, TimedRunner
from slimkit.progress import track


@dataclass(frozen=True)
class Latency:
    """Time of one run on example inputs.

    Args:
        median_ms: half of the runs were faster.
        p95_ms: 95 % of the runs were faster.
        runs: how many were timed.
    """

    median_ms: float
    p95_ms: float
    runs: int


def measure(
    runners: Mapping[str, Runner],
    inputs: tuple[Tensor, ...],
    *,
    seconds: float = 1.0,
    least_runs: int = 30,
    most_runs: int = 2000,
    what: str = "measuring latency",
) -> dict[str, Latency]:
    """Time each runner on `inputs`, taking turns so that a noisy machine hurts all alike.

    A `TimedRunner` tells its times itself; any other's calls are timed here.

    Args:
        runners: what to time, by name.
        inputs: tensors for one run.
        seconds: how long to measure each, about.
        least_runs: run each at least this often.
        most_runs: and at most this often.
        what: how the progress bar is called.
    """
    first = {}
    for name, run in runners.items():
        for _ in range(3):  # lazy set-up, caches
            first[name] = _times(run, inputs, 1)[0] / 1000
    slowest = max(first.values(), default=0.0)
    runs = int(min(most_runs, max(least_runs, seconds / max(slowest, 1e-9))))
    blocks = 10
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in track(range(blocks), what):
        for name, run in runners.items():
            run(*inputs)  # the first run of a block pays for the others' cache
            times[name] += _times(run, inputs, -(-runs // blocks))
    return {
        name: Latency(statistics.median(t), statistics.quantiles(t, n=20)[-1], len(t))
        for name, t in times.items()
    }


def _times(run: Runner, inputs: tuple[Tensor, ...], runs: int) -> list[float]:
    """Milliseconds of each of so many runs."""
    if isinstance(run, TimedRunner):
        return run.times(inputs, runs)
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        run(*inputs)
        found.append(1000 * (time.perf_counter() - start))
    return found


def usable_threads() -> int:
    """How many threads can compute at once: the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
