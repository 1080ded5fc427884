"""The table of deployed files in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def human(count: float) -> str:
    """A count in thousands or millions.

    >>> human(853018), human(125485696)
    ('853 k', '125.5 M')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f} G"
    if count >= 1e6:
        return f"{count / 1e6:.1f} M"
    return f"{count / 1e3:.0f} k" if count >= 1e4 else f"{count:.0f}"


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text, from `slimkit.deploy.release.Row.as_dict`."""
    latency, agreement = row["latency"], row["agreement"]
    share = agreement["close"] if agreement["top1"] is None else agreement["top1"]
    metric = "-" if row["metric"] is None else f"{row['metric']:.4f}"
    every, peak = row.get("latency_all"), row.get("peak_bytes")  # artifacts of old have neither
    return [
        row["label"],
        row["runtime"],
        metric,
        human(row["parameters"]),
        human(row["macs"]),
        f"{row['size_bytes'] / 1024:,.0f} KiB",
        f"{latency['median_ms']:.3f}",
        f"{latency['p95_ms']:.3f}",
        "-" if every is None else f"{every['median_ms']:.3f}",
        "-" if peak is None else f"{peak / 2**20:.1f}",
        f"{share:.2%}",
    ]


def headings(metric: str | None) -> list[str]:
    """The columns' names."""
    name = (metric or "metric").removeprefix("val_")
    heads = ["model", "runtime", name, "params", "MACs", "file", "ms median", "ms p95"]
    return [*heads, "ms, all threads", "peak MiB", "agrees"]


def table(rows: Sequence[dict[str, Any]], metric: str | None) -> Table:
    """The table of all deployed files, ready for a rich console."""
    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for position, heading in enumerate(headings(metric)):
        name = "\n".join(heading.rsplit(" ", 1))  # two lines: the numbers are narrow
        result.add_column(name, justify="left" if position < 2 else "right", no_wrap=position > 1)
    for row in rows:
        result.add_row(*cells(row), style="bold" if row["stage"] == "int8" else "")
    return result


def footnote(
    data: str, inputs: int, metric: str | None, rows: Sequence[dict[str, Any]] = ()
) -> str:
    """What the columns were measured on."""
    name = (metric or "metric").removeprefix("val_")
    threads = sorted({row.get("threads", 1) for row in rows} - {1})
    every = f", and on all {' or '.join(map(str, threads))}" if threads else ""
    said = (
        f"{name} and agreement: computed by the files on {inputs:,} {data} inputs; agreement is "
        f"with the model that the file was made from. Latency: one sample, one thread{every}."
    )
    if any(row.get("peak_bytes") is not None for row in rows):
        said += " Peak: memory that running the file adds to a process that has the runtime."
    return said


def unmeasured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each number that is missing, with the files that lack it."""
    files: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for what, why in row.get("unmeasured", {}).items():
            files.setdefault((what, why), []).append(f"{row['label']} on {row['runtime']}")
    return [
        f"{what} was not measured of {', '.join(names)}: {why}"
        for (what, why), names in files.items()
    ]
