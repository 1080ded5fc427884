"""`slimkit check`: every problem of a recipe at once, before any training."""

from __future__ import annotations

from pathlib import Path

import click

from slimkit.cli.output import emit, json_option


@click.command()
@click.argument("recipe")
@click.option(
    "--targets", is_flag=True,
    help="Build the model, too, and ask each backend what it cannot run, runs in float or slowly.",
)  # fmt: skip
@json_option("Print the problems as JSON.")
def check(recipe: str, targets: bool, as_json: bool) -> None:
    """Report every problem of a RECIPE (a file, or "demo") at once.

    Nothing is trained. Without --targets no model is imported and it takes less than a second. With
    it the model as it is now is tried on every backend of `export`, in float and, if the recipe
    quantizes, in int8. Exits with 2 if there is any problem; what runs in float or slowly is none.

    \b
    Example:
        slimkit check recipe.yaml
        slimkit check recipe.yaml --targets
    """  # noqa: D301 click keeps the lines behind its mark
    import json

    from slimkit.check import problems
    from slimkit.cli.recipes import located
    from slimkit.errors import RecipeError

    path = located(recipe)
    found = problems(path)
    if targets and not found:
        _check_targets(recipe, path, as_json)
        return
    if as_json:
        listed = [{"path": problem.path, "message": problem.message} for problem in found]
        emit(json.dumps({"recipe": recipe, "problems": listed}, indent=2))
        raise SystemExit(2 if found else 0)
    if found:
        count = "one problem" if len(found) == 1 else f"{len(found)} problems"
        raise RecipeError(f"{recipe} has {count}:", found)
    click.echo(f"{recipe}: no problems found, ready for 'slimkit run {recipe}'")


def _check_targets(recipe: str, path: Path, as_json: bool) -> None:
    """Print what each backend makes of the model; exits with 2 where one cannot run it."""
    import json
    from dataclasses import asdict

    click.echo("slimkit: loading torch and Lightning", err=True)

    from slimkit.recipe import Recipe
    from slimkit.training.preflight import preflight_of

    results = preflight_of(Recipe.read(path), lambda line: click.echo(f"slimkit: {line}", err=True))
    bad = any(result.problems for result in results)
    if as_json:
        listed = [asdict(result) for result in results]
        emit(json.dumps({"recipe": recipe, "problems": [], "targets": listed}, indent=2))
        raise SystemExit(2 if bad else 0)
    for result in results:
        click.echo(str(result))
    if bad:
        raise SystemExit(2)
