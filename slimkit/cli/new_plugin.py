"""`slimkit new-plugin`: a package that installs, is listed and passes its tests."""

from __future__ import annotations

from pathlib import Path

import click

from slimkit.registry import kinds


@click.command()
@click.argument("kind", type=click.Choice(kinds))
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder to write the package's own folder into; left out, the present one.",
)
def new_plugin(kind: str, name: str, output: Path) -> None:
    """Write a package for a new plugin.

    KIND is what it is, NAME what a recipe will call it: lower-case letters, digits and hyphens.
    The folder slimkit-NAME holds pyproject.toml, the record that slimkit finds, a class with its
    contract to be replaced by yours, tests, a README and a CI file. Nothing that exists is
    overwritten.

    \b
    For example, a pruning criterion:
      slimkit new-plugin criterion my-taylor
      cd slimkit-my-taylor
      pip install --editable '.[dev]'
      slimkit list-plugins my-taylor
      pytest

    The tests run slimkit's conformance suite, which has a check for every promise that slimkit
    relies on. Exits with 2 where the name is no valid one, or taken.
    """  # noqa: D301  (click reads the escape)
    from slimkit.scaffold.naming import names_for
    from slimkit.scaffold.package import write_package

    names = names_for(kind, name)
    folder = write_package(names, output)
    click.echo(f"wrote {folder}: the {kind} {name!r} is {names.module}.{kind}:{names.cls}")
    click.echo("\nnext:")
    for line in (f"cd {folder}", "pip install --editable '.[dev]'", "pytest"):
        click.echo(f"  {line}")
