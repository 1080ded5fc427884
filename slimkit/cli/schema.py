"""`slimkit schema`: what a recipe may hold, for editors."""

from __future__ import annotations

import click


@click.command()
def schema() -> None:
    """Print the JSON schema of recipes.

    Editors complete and check YAML by it. With the YAML language server, for example, put
    `# yaml-language-server: $schema=recipe.schema.json` at the top of a recipe after
    `slimkit schema > recipe.schema.json`.
    """
    import json

    from slimkit.recipe import Recipe

    click.echo(json.dumps(Recipe.json_schema(), indent=1))
