"""`slimkit sensitivity`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--quantize", is_flag=True, help="Scan what rounding costs (the one scan there is).")
@click.option(
    "--backend", "-b", metavar="NAME", help="Whose rounding.  [default: the first of `export`]"
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
    default=4,
    show_default=True,
    help="Training samples that the noise is measured on.",
)
@click.option("--show", type=click.IntRange(min=1), default=15, show_default=True, help="Rows.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars, no lines between.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole ranking as JSON.")
def sensitivity(
    recipe: Path,
    quantize: bool,
    backend: str | None,
    output: Path | None,
    samples: int,
    show: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Rank every place that quantization would round in RECIPE's model by the noise it causes.

    Each place is rounded alone, and its noise is measured where the last layers give their outputs:
    40 dB and more are harmless, under 20 dB the noise is over 1 % of the signal. The places at the
    top are what `keep_float: [...]` is for; `keep_float: auto` does it by itself.

    Every result is kept at once: a scan that was killed goes on where it was. Written are CSV, JSON
    and a plot.
    """
    from slimkit.cli.recipes import sayer, usable
    from slimkit.errors import SlimkitError

    if not quantize:
        raise SlimkitError("say what to scan: --quantize (pruning has no scan yet)")
    what, stem = usable(recipe)
    if backend is None and not what.export:
        raise SlimkitError("the recipe exports to no backend: choose one with --backend")
    name = backend or what.export[0].name
    folder = output or Path("runs") / f"{stem}-sensitivity"

    from slimkit.progress import quiet as without_bars

    say = sayer(quiet)
    with without_bars(quiet):
        say("loading torch and Lightning")
        from slimkit.plain import plain
        from slimkit.report.sensitivity import scan_table, write_scan
        from slimkit.training.scan import scan

        ranked = scan(what, name, folder / f"{name}.jsonl", samples=samples, say=say)
        paths = write_scan(folder, name, ranked)
    if as_json:
        import json

        click.echo(json.dumps(plain(ranked), indent=1))
        return
    from rich.console import Console

    Console().print(scan_table(ranked, show))
    click.echo(f"{len(ranked)} places; written: {', '.join(map(str, paths))}")
