"""Prints what a run measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slimkit.cli.output import emit

if TYPE_CHECKING:
    from slimkit.training.deployment import Release


def show(release: Release, seconds: Mapping[str, float], *, as_json: bool) -> None:
    """The table, the verdicts and where the artifact is; or all of it as JSON."""
    from slimkit.rewriting.report import summarized

    rows = [row.as_dict() for row in release.rows]
    metric = release.metric.name if release.metric is not None else None
    if as_json:
        content = {
            "directory": str(release.directory),
            "metric": metric,
            "data": release.data,
            "rows": rows,
            "verdicts": release.verdicts,
            "rewriting": summarized(release.rewriting),
            "seconds": dict(seconds),
        }
        emit(json.dumps(content, indent=1))
        return
    import sys

    from rich.console import Console

    from slimkit.report.table import footnote, table, unmeasured

    width = None if sys.stdout.isatty() else 120
    console = Console(width=width, highlight=False)
    console.print()
    console.print(table(rows, metric))
    console.print()
    console.print(footnote(release.data, rows[0]["agreement"]["inputs"], metric, rows))
    for rewrite in summarized(release.rewriting):
        console.print(f"{rewrite['name']}: {rewrite['places']} places; {rewrite['cost']}.")
    for sentence in unmeasured(rows):
        console.print(sentence)
    for runtime, verdict in release.verdicts.items():
        console.print(f"{runtime}: {verdict}.")
    if seconds:
        parts = "; ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        console.print(f"time: {parts}")
    console.print(f"artifact: {release.directory} (look at {release.directory}/report.html)")
