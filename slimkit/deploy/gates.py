"""Checks the deployed files against the gates of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from slimkit.deploy.release import Row
from slimkit.recipe import Gates


def missed(gates: Gates, rows: Iterable[Row], *, larger_is_better: bool = True) -> list[str]:
    """One sentence for each gate that a deployed file misses; empty if all hold.

    Args:
        gates: the limits.
        rows: what was measured; the last stage of each runtime is judged against its dense stage.
        larger_is_better: of the metric.
    """
    by_runtime: dict[str, list[Row]] = {}
    for row in rows:
        if row.variant:  # measured for the report, not deployed
            continue
        by_runtime.setdefault(row.runtime, []).append(row)
    misses = []
    for runtime, stages in by_runtime.items():
        dense, final = stages[0], stages[-1]

        def over(name: str, value: float, limit: float | None, runtime: str = runtime) -> None:
            if limit is not None and not value <= limit + 1e-12:  # NaN misses every gate
                misses.append(f"{name}: {value:.4g} on {runtime}, at most {limit:g} was asked for")

        if dense.metric is not None and final.metric is not None:
            drop = dense.metric - final.metric
            over("accuracy_drop", drop if larger_is_better else -drop, gates.accuracy_drop)
        elif gates.accuracy_drop is not None:
            misses.append(f"accuracy_drop: no metric was measured on {runtime}")
        over("macs_ratio", final.macs / dense.macs, gates.macs_ratio)
        over("params_ratio", final.parameters / dense.parameters, gates.params_ratio)
        over("size_ratio", final.size_bytes / dense.size_bytes, gates.size_ratio)
        latency = final.latency.median_ms / dense.latency.median_ms
        over("latency_ratio", latency, gates.latency_ratio)
        share = final.agreement.share
        if gates.agreement is not None and not share >= gates.agreement:
            misses.append(
                f"agreement: {share:.4g} on {runtime}, at least {gates.agreement:g} was asked for"
            )
    return misses
