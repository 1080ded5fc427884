"""Line plots of accuracy, for the tables of this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot

matplotlib.use("Agg")

Lines = Mapping[str, Sequence[float]]


def accuracies(path: Path, panels: Mapping[str, Lines], shares: Sequence[float]) -> None:
    """One panel a network: a line of accuracies (0 to 1) for each name, labelled at its end.

    Args:
        path: the PNG.
        panels: title to lines.
        shares: of the multiply-accumulates that are left, one for each accuracy, falling.
    """
    figure, row = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False, sharey=True
    )
    for axes, (title, lines) in zip(row[0], panels.items(), strict=True):
        for number, (name, values) in enumerate(lines.items()):
            colour = _colour(number)
            dashed = "--" if name == "random" else "-"
            axes.plot(shares, [100 * v for v in values], dashed, marker="o", ms=4, color=colour)
        _label(axes, {name: (shares[-1], 100 * values[-1]) for name, values in lines.items()})
        axes.invert_xaxis()
        axes.set_xlim(shares[0] + 0.02, shares[-1] - 0.14)
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axes.set_xlabel("multiply-accumulates left")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    row[0][0].set_ylabel("top-1 accuracy, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _label(axes: pyplot.Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Names at the ends of lines, moved apart where they would lie on each other."""
    low, high = axes.get_ylim()
    apart = (high - low) / 24
    last = float("-inf")
    order = list(ends)
    for name, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        last = max(y, last + apart)
        colour = _colour(order.index(name))
        axes.annotate(
            name, (x, y), (x - 0.012, last), textcoords="data", color=colour, fontsize=8,
            va="center",
        )  # fmt: skip


def _colour(number: int) -> tuple[float, ...]:
    """The ten dark colours first, then their pale ones."""
    found: tuple[float, ...] = pyplot.get_cmap("tab20")(2 * number % 20 + number // 10 % 2)
    return found
