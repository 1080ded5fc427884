"""`slimkit compare`: does the deployed file compute what was simulated?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimkit.cli.output import emit, json_option

if TYPE_CHECKING:
    from collections.abc import Iterable

    from slimkit.deploy.agreement import Agreement
    from slimkit.deploy.layers import LayerReport


@click.command()
@click.argument("artifact", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--data",
    metavar="PATH",
    help="package.module:function that gives batches of inputs, with or without labels, or a data "
    "module, whose test data is taken.  [default: the recipe's data]",
)
@click.option(
    "--model",
    metavar="PATH",
    help="package.module:function that builds the dense model.  [default: the recipe's model]",
)
@click.option("--backend", "-b", metavar="NAME", help="Only the file for this runtime.")
@click.option(
    "--inputs", type=click.IntRange(min=1), default=1000, show_default=True,
    help="Compare on so many inputs at most.",
)  # fmt: skip
@click.option("--per-layer", is_flag=True, help="Find the first layer where the file departs.")
@click.option(
    "--least-db", type=float, default=20.0, show_default=True,
    help="Below this ratio of signal to difference a layer has departed.",
)  # fmt: skip
@click.option(
    "--least", type=click.FloatRange(0, 1), metavar="SHARE",
    help="Exit with 3 if less than this share agrees.  [default: the recipe's gate, or 0.99]",
)  # fmt: skip
@json_option("Print the comparison as JSON.")
def compare(
    artifact: Path,
    data: str | None,
    model: str | None,
    backend: str | None,
    inputs: int,
    per_layer: bool,
    least_db: float,
    least: float | None,
    as_json: bool,
) -> None:
    """Run the deployed files of ARTIFACT and their simulation on the same inputs.

    ARTIFACT is a folder that `slimkit run` or `slimkit.export` wrote. What agrees is the share of
    inputs with the same largest class, or, where the outputs are no classes, of values within 1 %
    of their output's largest. With --per-layer the model is compiled once more, in a temporary
    folder, with what its layers make as further outputs; the first layer that departs is named.

    \b
    Example:
        slimkit compare runs/demo --per-layer
        slimkit compare out --model my_models:resnet50 --data my_data:batches --backend ncnn
    """  # noqa: D301 click keeps the lines behind its mark
    from slimkit.fields import is_import_path

    for path, hint in ((model, "--model"), (data, "--data")):
        if path is not None and not is_import_path(path):
            raise click.BadParameter(
                f"should look like 'package.module:function', not {path!r}", param_hint=hint
            )

    import json

    from torch import nn

    from slimkit.copies import uncompiled_
    from slimkit.deploy.folder import read_manifest
    from slimkit.deploy.reopening import reopen
    from slimkit.errors import GateError
    from slimkit.importing import build

    recipe = read_manifest(artifact).get("recipe") or {}
    if least is None:
        least = (recipe.get("gates") or {}).get("agreement") or 0.99
    batches = _batches(artifact, data, recipe)
    built_by = {"target": model} if model is not None else recipe.get("model")
    dense = build(built_by, "model", nn.Module) if built_by else None
    if dense is not None:
        from slimkit.parts import complete_
        from slimkit.training.entering import entered

        dense = complete_(uncompiled_(dense), recipe.get("network"))
        batches = entered(batches, dense, recipe.get("network"))
    results = []
    for file in reopen(artifact, dense, backend=backend):
        found = file.agreement(batches, inputs)
        layers = file.layers(batches, least_db=least_db) if per_layer else None
        results.append((file.runtime, found, layers))
        if not found.share >= least and (wide := file.too_wide) is not None:
            click.echo(f"slimkit: {file.runtime}: {wide}", err=True)
    if as_json:
        emit(json.dumps([_plain(*result) for result in results], indent=1))
    else:
        _show(results)
    low = [f"{found.share:.4g} on {name}" for name, found, _ in results if not found.share >= least]
    if low:
        raise GateError(
            f"agreement: {', '.join(low)}, at least {least:g} was asked for"
            + ("" if per_layer else "; --per-layer finds the layer")
        )


def _batches(artifact: Path, data: str | None, recipe: dict[str, Any]) -> Iterable[Any]:
    """The batches to compare on, which can be gone through more than once."""
    from slimkit.errors import SlimkitError
    from slimkit.importing import build

    what = {"target": data} if data is not None else recipe.get("data")
    if not what:
        raise SlimkitError(
            f"{artifact} does not say which data it was measured on: name it with "
            "--data package.module:function"
        )
    made: Any = build(what, "data", object)
    if hasattr(made, "setup"):
        from slimkit.training.deployment import Loaders

        loader: Iterable[Any] = Loaders(made).compared()
        return loader
    if not hasattr(made, "__iter__"):
        raise SlimkitError(
            f"data: {what['target']} must give batches or a data module, not {type(made).__name__}"
        )
    return list(made) if hasattr(made, "__next__") else made


def _plain(runtime: str, found: Agreement, layers: LayerReport | None) -> dict[str, Any]:
    """One file's comparison as plain data; what is infinite becomes null."""
    from slimkit.deploy.layers import as_plain
    from slimkit.plain import plain

    listed = {} if layers is None else {"per_layer": as_plain(layers)}
    return {"runtime": runtime, "agrees": found.share, **plain(found), **listed}


def _show(results: list[tuple[str, Agreement, LayerReport | None]]) -> None:
    import sys

    from rich.console import Console

    from slimkit.report.comparison import files, layers

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print(files([(runtime, found) for runtime, found, _ in results]))
    for runtime, _, report in results:
        if report is None:
            continue
        console.print(f"\n{runtime}, {report.inputs} inputs, in order of execution:")
        console.print(layers(report))
        for sentence in (report.verdict, *report.reservations):
            console.print(f"{sentence[0].upper()}{sentence[1:]}.")
