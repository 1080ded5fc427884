"""The distribution of batch-norm's gammas as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from slimkit.pruning.gammas import Gammas

BARS = " ▁▂▃▄▅▆▇█"


def bars(counts: Sequence[int]) -> str:
    """A histogram of one line; the tallest bar is the largest count.

    >>> bars([8, 4, 0, 1])
    '█▄ ▁'
    """
    tallest = max([*counts, 1])
    return "".join(BARS[-(-count * (len(BARS) - 1) // tallest)] for count in counts)


def gamma_table(layers: Sequence[Gammas]) -> Table:
    """One row a batch-norm; the histograms go from 0 to the model's largest gamma."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("batch-norm", overflow="fold")
    for heading in ("channels", "least", "median", "most", "near 0"):
        table.add_column(heading, justify="right", no_wrap=True)
    most = max((layer.most for layer in layers), default=0.0)
    table.add_column(f"|gamma| from 0 to {most:.3g}", no_wrap=True)
    for layer in layers:
        sizes = (f"{size:.3g}" for size in (layer.least, layer.median, layer.most))
        row = (layer.name, str(layer.channels), *sizes, f"{layer.small:.0%}", bars(layer.counts))
        table.add_row(*row)
    return table
