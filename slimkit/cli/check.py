"""`slimkit check`: every problem of a recipe at once, before any training."""

from __future__ import annotations

import click


@click.command()
@click.argument("recipe")
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON.")
def check(recipe: str, as_json: bool) -> None:
    """Report every problem of a RECIPE at once.

    Nothing is trained and no model is imported. Exits with 2 if there is any problem.
    """
    import json

    from slimkit.check import problems
    from slimkit.errors import RecipeError

    found = problems(recipe)
    if as_json:
        listed = [{"path": problem.path, "message": problem.message} for problem in found]
        click.echo(json.dumps({"recipe": recipe, "problems": listed}, indent=2))
        raise SystemExit(2 if found else 0)
    if found:
        count = "one problem" if len(found) == 1 else f"{len(found)} problems"
        raise RecipeError(f"{recipe} has {count}:", found)
    click.echo(f"{recipe}: no problems found, ready for 'slimkit run {recipe}'")
