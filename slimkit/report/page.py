"""The HTML report of one artifact: a single file without scripts or outside links."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from slimkit.report.table import cells, footnote, headings, unmeasured


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    recipe: str,
    plugins: Sequence[Mapping[str, str | None]] = (),
) -> None:
    """Write the page.

    Args:
        path: the file.
        metrics: what the artifact's manifest holds under ``metrics``.
        recipe: the recipe as YAML, shown at the end.
        plugins: kind, name, package and version of each plugin used.
    """
    environment = Environment(
        loader=PackageLoader("slimkit.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
    )
    name = metrics["metric"]["name"] if metrics["metric"] else None
    page = environment.get_template("report.html").render(
        headings=[*headings(name), "SQNR dB"],
        rows=[(row["stage"], [*cells(row), _decibels(row)]) for row in metrics["rows"]],
        footnote=footnote(
            metrics["data"], metrics["rows"][0]["agreement"]["inputs"], name, metrics["rows"]
        ),
        unmeasured=unmeasured(metrics["rows"]),
        metrics=metrics,
        recipe=recipe,
        plugins=plugins,
        bars=_bars(metrics["rows"]),
        channels=_channels(metrics["pruning"]),
        operators=[
            (r["label"], r["runtime"], sorted(r["operators"].items()))
            for r in metrics["rows"]
            if r["operators"]
        ],
        times=[
            (r["label"], r["runtime"], _dearest(r["operator_ms"]))
            for r in metrics["rows"]
            if r.get("operator_ms")
        ],
    )
    path.write_text(page, encoding="utf-8")


def _dearest(times: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Operator types with milliseconds and share of the whole, the dearest first."""
    total = sum(times.values()) or 1.0
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return [(name, ms, ms / total) for name, ms in ordered]


def _decibels(row: Mapping[str, Any]) -> str:
    """The worst output's signal to noise ratio against the model the file was made from."""
    ratios = [r for r in row["agreement"]["sqnr_db"] if r is not None]
    return f"{min(ratios):.1f}" if ratios else "exact"


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def _bars(rows: list[Mapping[str, Any]]) -> str:
    """Latency and size of each stage, a panel each, runtimes side by side."""
    from matplotlib.figure import Figure

    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(9, 2.6 + 0.2 * len(runtimes)))
    panels = figure.subplots(1, 2)
    measures = (
        ("latency, ms (median, one thread)", "{:.3f}", lambda r: r["latency"]["median_ms"]),
        ("file size, KiB", "{:,.0f}", lambda r: r["size_bytes"] / 1024),
    )
    colors = {"dense": "#9aa5b1", "compressed": "#4c8eda", "int8": "#1b998b"}
    height = 0.8 / len(stages)
    for panel, (title, form, value) in zip(panels, measures, strict=True):
        for n, stage in enumerate(stages):
            values = [
                next(value(r) for r in rows if r["stage"] == stage and r["runtime"] == runtime)
                for runtime in runtimes
            ]
            places = [k + n * height for k in range(len(runtimes))]
            label = next(r["label"] for r in rows if r["stage"] == stage)
            bars = panel.barh(places, values, height * 0.9, color=colors.get(stage), label=label)
            panel.bar_label(bars, fmt=form, padding=3, fontsize=8)
        panel.set_yticks([k + height * (len(stages) - 1) / 2 for k in range(len(runtimes))])
        panel.set_yticklabels(runtimes)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=len(stages), frameon=False
    )
    figure.subplots_adjust(bottom=0.22, wspace=0.35)
    return _png(figure)


def _channels(pruning: Mapping[str, Any] | None) -> str | None:
    """Channels before and after, one bar a group."""
    if not pruning or not pruning["groups"]:
        return None
    from matplotlib.figure import Figure

    groups = pruning["groups"]
    figure = Figure(figsize=(9, 0.8 + 0.24 * len(groups)))
    panel = figure.subplots()
    before = [sizes[0] for sizes in groups.values()]
    after = [sizes[1] for sizes in groups.values()]
    panel.barh(range(len(groups)), before, color="#e4e7eb", label="removed")
    bars = panel.barh(range(len(groups)), after, color="#4c8eda", label="kept")
    labels = [f"{a} of {b}" for a, b in zip(after, before, strict=True)]
    panel.bar_label(bars, labels, padding=3, fontsize=7)
    panel.set_yticks(range(len(groups)))
    panel.set_yticklabels(list(groups), fontsize=8)
    panel.set_ylim(len(groups) - 0.4, -0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("channels", fontsize=9)
    panel.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return _png(figure)
