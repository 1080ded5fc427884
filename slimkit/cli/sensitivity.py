"""`slimkit sensitivity`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimkit.cli.output import emit, json_option

if TYPE_CHECKING:
    from rich.table import Table

    from slimkit.recipe import Recipe

Result = tuple[Any, "Table", str]
"""What to print as JSON, or as a table, and what was written."""


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--quantize", is_flag=True, help="Scan what rounding each place costs, not what pruning does."
)
@click.option(
    "--backend",
    "-b",
    metavar="NAME",
    help="With --quantize: whose rounding.  [default: the first of `export`]",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results.  [default: runs/<recipe's name>-sensitivity]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Validation samples to draw from at most.  [default: all; with --quantize: 4 training "
    "samples]",
)
@click.option(
    "--precision",
    type=click.FloatRange(0, 1),
    metavar="FRACTION",
    help="A point is known when its standard error is this fraction of its value, or of half of "
    "the largest in its row; 0 uses every sample for every point.  [default: 0.3]",
)
@click.option("--show", type=click.IntRange(min=1), default=15, show_default=True, help="Rows.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars, no lines between.")
@json_option("Print the whole result as JSON.")
def sensitivity(
    recipe: Path,
    quantize: bool,
    backend: str | None,
    output: Path | None,
    samples: int | None,
    precision: float | None,
    show: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure what pruning costs each part of RECIPE's model, and what rounding does.

    Without options: every group of channels that hang together (a residual stage is one group)
    loses 10 % to 70 % of them, by the recipe's criterion, while all else stays whole. A row says
    how much the loss on the validation data grows: where it stays near 0, channels are to spare;
    where it turns steep, hold the group back with `prune.ratios` or `prune.protect`. Or write
    `prune.ratios: sensitivity`, and the whole target is shared out by this scan. The scan takes
    random samples until a point is clear, and computes only what the group reaches.

    With --quantize: each place is rounded alone, and its noise is measured where the last layers
    give their outputs: 40 dB and more are harmless, under 20 dB the noise is over 1 % of the
    signal. The places at the top are what `keep_float: [...]` is for; `keep_float: auto` does it
    by itself.

    Every result is kept at once: a scan that was killed goes on where it was. Written are CSV, JSON
    and a plot.
    """
    from slimkit.cli.recipes import sayer, usable
    from slimkit.errors import SlimkitError

    what, stem = usable(recipe)
    if quantize:
        if precision is not None:
            raise SlimkitError("--precision is of the pruning scan: leave it or --quantize out")
        if backend is None and not what.export:
            raise SlimkitError("the recipe exports to no backend: choose one with --backend")
    elif backend is not None:
        raise SlimkitError("--backend says whose rounding: it needs --quantize")
    elif what.prune is None:
        raise SlimkitError(
            "the recipe has no prune section: there is nothing to scan (--quantize scans what "
            "rounding costs)"
        )
    folder = output or Path("runs") / f"{stem}-sensitivity"

    from slimkit.progress import quiet as without_bars

    say = sayer(quiet)
    with without_bars(quiet):
        say("loading torch and Lightning")
        result: Result | None
        if quantize:
            result = _rounding(what, backend or what.export[0].name, folder, samples, show, say)
        else:
            result = _pruning(what, folder, samples, precision, show, say)
    if result is None:
        return
    data, table, written = result
    if as_json:
        import json

        from slimkit.plain import plain

        emit(json.dumps(plain(data), indent=1))
        return
    from rich.console import Console

    Console().print(table)
    click.echo(written)


def _rounding(
    recipe: Recipe,
    backend: str,
    folder: Path,
    samples: int | None,
    show: int,
    say: Callable[[str], None],
) -> Result:
    from slimkit.report.sensitivity import scan_table, write_scan
    from slimkit.training.scan import scan

    ranked = scan(recipe, backend, folder / f"{backend}.jsonl", samples=samples or 4, say=say)
    paths = write_scan(folder, backend, ranked)
    written = f"{len(ranked)} places; written: {', '.join(map(str, paths))}"
    return ranked, scan_table(ranked, show), written


def _pruning(
    recipe: Recipe,
    folder: Path,
    samples: int | None,
    precision: float | None,
    show: int,
    say: Callable[[str], None],
) -> Result | None:
    """None in a process that only helps another one."""
    from slimkit.pruning.sensitivity import PRECISION
    from slimkit.report.curves import curves_table, write_curves
    from slimkit.training.processes import is_first, part
    from slimkit.training.pruning_scan import scan_pruning

    known = PRECISION if precision is None else precision
    curves = scan_pruning(recipe, folder, samples=samples, precision=known, say=say)
    part()
    if not is_first():
        return None
    paths = write_curves(folder, curves)
    unit = curves[0].unit
    written = f"{len(curves)} groups, {unit}; written: {', '.join(map(str, paths))}"
    return curves, curves_table(curves, show), written
