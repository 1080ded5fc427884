"""The tables of `slimkit compare` in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from slimkit.deploy.agreement import Agreement
from slimkit.deploy.layers import LayerReport

_SHOWN = 4
"""Outputs whose ratios are written out; of more, the lowest is."""


def files(results: Sequence[tuple[str, Agreement]]) -> Table:
    """One row a runtime."""
    table = _table(["runtime", "inputs", "agrees", "SQNR dB", "largest difference"])
    for runtime, found in results:
        what = "same class" if found.top1 is not None else "values within 1 %"
        table.add_row(
            runtime,
            f"{found.inputs:,}",
            f"{found.share:.2%} ({what})",
            _ratios(found.sqnr_db),
            f"{found.largest_difference:.4g}",
        )
    return table


def layers(report: LayerReport) -> Table:
    """One row a layer; the first that departs stands out."""
    table = _table(["layer", "SQNR dB", "largest difference", "in steps", "a step or more off"])
    for layer in report.layers:
        table.add_row(
            layer.layer,
            decibels(layer.sqnr_db),
            f"{layer.largest_difference:.4g}",
            "-" if layer.largest_steps is None else f"{layer.largest_steps:.2f}",
            "-" if layer.departed is None else f"{layer.departed:.2%}",
            style="bold" if layer is report.first else "",
        )
    return table


def decibels(ratio: float) -> str:
    """A ratio for people.

    >>> decibels(41.234), decibels(math.inf)
    ('41.2', 'equal')
    """
    return "equal" if ratio == math.inf else f"{ratio:.1f}"


def _ratios(ratios: Sequence[float]) -> str:
    if len(ratios) > _SHOWN:
        return f"{decibels(min(ratios))} (lowest of {len(ratios)} outputs)"
    return ", ".join(map(decibels, ratios))


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for position, name in enumerate(columns):
        table.add_column(name, justify="right" if position else "left", overflow="fold")
    return table
