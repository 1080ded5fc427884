"""`slimkit run`."""

from __future__ import annotations

from pathlib import Path

import click

from slimkit.cli.output import json_option


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the artifact.  [default: the recipe's own, or runs/<recipe's name>]",
)
@click.option("--epochs", type=click.IntRange(min=0), help="Instead of the recipe's max_epochs.")
@click.option("--fresh", is_flag=True, help="Start over; do not go on from an unfinished run.")
@click.option(
    "--preflight/--no-preflight", default=True,
    help="Try the model on each backend first, and train nothing that cannot be exported.  "
    "[default: yes]",
)  # fmt: skip
@click.option("--quiet", "-q", is_flag=True, help="No progress bars, no lines between.")
@json_option("Print the measurements as JSON.")
def run(
    recipe: Path,
    output: Path | None,
    epochs: int | None,
    fresh: bool,
    preflight: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Prune, distil, quantize, export and prove: everything that RECIPE says.

    RECIPE is a YAML file (or "demo": the recipe that ships with slimkit). Model and data are found
    in the current folder or among the installed packages. The artifact is a folder with the
    compressed weights, a file for each runtime, the measurements and report.html.

    A run that was killed goes on from its last epoch when the same command is given again. If a
    gate of the recipe is missed, the exit code is 3, the new artifact is put into
    <output>.rejected, and the last good one stays.
    """
    from slimkit.cli.recipes import sayer, usable

    what, name = usable(recipe)
    if epochs is not None:
        trainer = what.trainer.model_copy(update={"max_epochs": epochs})
        what = what.model_copy(update={"trainer": trainer})
    target = output or what.output or Path("runs") / name

    from slimkit.cli.results import show
    from slimkit.progress import quiet as without_bars

    say = sayer(quiet)
    with without_bars(quiet):
        say("loading torch and Lightning")
        from slimkit.training.deployment import MissedGates
        from slimkit.training.run import run as run_recipe

        try:
            done = run_recipe(what, target, say=say, fresh=fresh, preflight=preflight)
        except MissedGates as error:
            show(error.release, {}, as_json=as_json)
            raise
    if done is not None:  # else this process has helped another one
        release, timing = done
        show(release, timing.seconds, as_json=as_json)
