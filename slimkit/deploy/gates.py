"""Checks the deployed files against the gates of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slimkit.deploy.release import Row
from slimkit.recipe import Gates


@dataclass(frozen=True)
class Judged:
    """One gate at one runtime.

    Args:
        gate: its name in the recipe.
        runtime: whose deployed file is judged.
        value: what was measured; None where nothing could be.
        limit: of the recipe.
        holds: whether the file passes.
    """

    gate: str
    runtime: str
    value: float | None
    limit: float
    holds: bool

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.gate}: no metric was measured on {self.runtime}"
        side = "at least" if self.gate == "agreement" else "at most"
        asked = f"{side} {self.limit:g} was asked for"
        return f"{self.gate}: {self.value:.4g} on {self.runtime}, {asked}"


def missed(found: Iterable[Judged]) -> list[str]:
    """One sentence for each gate that a deployed file misses; empty if all hold."""
    return [str(one) for one in found if not one.holds]


def judged(gates: Gates, rows: Iterable[Row], *, larger_is_better: bool = True) -> list[Judged]:
    """Every gate that is set, at each runtime.

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
    found = []
    for runtime, stages in by_runtime.items():
        dense, final = stages[0], stages[-1]
        drop = None
        if dense.metric is not None and final.metric is not None:
            drop = (dense.metric - final.metric) * (1 if larger_is_better else -1)
        values = {
            "accuracy_drop": drop,
            "macs_ratio": final.macs / dense.macs,
            "params_ratio": final.parameters / dense.parameters,
            "size_ratio": final.size_bytes / dense.size_bytes,
            "latency_ratio": final.latency.median_ms / dense.latency.median_ms,
            "agreement": final.agreement.share,
        }
        for gate, value in values.items():
            limit: float | None = getattr(gates, gate)
            if limit is None:
                continue
            if value is None:
                holds = False
            elif gate == "agreement":
                holds = value >= limit
            else:
                holds = value <= limit + 1e-12  # NaN misses every gate
            found.append(Judged(gate, runtime, value, limit, holds))
    return found
