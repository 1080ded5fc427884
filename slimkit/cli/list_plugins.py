"""`slimkit list-plugins`: what is installed, read without importing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from slimkit.cli.output import emit, json_option
from slimkit.registry import kinds

if TYPE_CHECKING:
    from rich.table import Table

    from slimkit.registry import Listed, Registry


@click.command()
@click.argument("name", required=False)
@click.option("--kind", type=click.Choice(kinds), help="Only plugins of this kind.")
@json_option("Print JSON.")
@click.option("--strict", is_flag=True, help="Exit with 1 if any installed plugin is broken.")
def list_plugins(name: str | None, kind: str | None, as_json: bool, strict: bool) -> None:
    """List plugins, or show the one called NAME.

    With NAME: its documentation, its options with types and defaults, and the integer scheme of a
    backend. Nothing is imported but the packages' registrations.
    """
    from slimkit.registry import discover

    registry = discover()
    wanted = [p for p in registry.plugins if kind in (None, p.kind) and name in (None, p.name)]
    if name is not None and not wanted:
        raise _unknown(registry, name, kind)
    shown = [_described(plugin) for plugin in wanted] if name else [vars(p) for p in wanted]
    if as_json:
        import json

        broken = [vars(b) for b in registry.broken]
        slow = [vars(s) for s in registry.slow]
        left_out = list(registry.left_out)
        listed = {"plugins": shown, "broken": broken, "left_out": left_out, "slow": slow}
        emit(json.dumps(listed, indent=2))
    elif name:
        for description in shown:
            _show(description)
    else:
        _print(_table(["kind", "name", "summary", "package", "version"], shown, wraps="summary"))
    if not as_json:
        for line in registry.absent():
            click.echo(line)
        for slow_one in registry.slow:
            click.echo(f"slow: {slow_one}")
    if strict and registry.broken:
        raise SystemExit(1)


def _unknown(registry: Registry, name: str, kind: str | None) -> Exception:
    from slimkit.errors import PluginError, did_you_mean

    owner = next(filter(None, (registry.owner(k, name) for k in ([kind] if kind else kinds))), None)
    known = {p.name for p in registry.plugins if kind in (None, p.kind)}
    hint = f"; {owner}" if owner else did_you_mean(name, sorted(known))
    message = f"no {kind or 'plugin'} is called {name!r}{hint}"
    return PluginError("\n  ".join([message, *registry.absent()]))


def _described(plugin: Listed) -> dict[str, Any]:
    """Everything that the source of a plugin tells; None where it does not."""
    from slimkit import source
    from slimkit.errors import PluginError, SlimkitError

    module, _, name = plugin.target.partition(":")
    try:
        found = source.read(module)
    except SlimkitError as error:
        raise PluginError(f"{plugin}: {error}") from error
    definition = found.find(name) if found else None
    if not definition:
        return {**vars(plugin), "doc": None, "options": None, "scheme": None}
    options = None
    if definition.options is not None:
        options = [
            {"option": option.name, "type": option.annotation, "default": option.default}
            for option in definition.options
        ]
    scheme = definition.attributes.get("scheme") if plugin.kind == "backend" else None
    return {**vars(plugin), "doc": definition.doc, "options": options, "scheme": scheme}


def _show(plugin: dict[str, Any]) -> None:
    click.echo("{kind} {name}: {summary}".format(**plugin))
    click.echo("{package} {version}, {target}\n".format(**plugin))
    if plugin["doc"] is None:
        click.echo("Its source is in another file or compiled; see the package's documentation.")
    else:
        click.echo(plugin["doc"] + "\n")
    if plugin["options"]:
        _print(_table(["option", "type", "default"], plugin["options"], wraps="type"))
    elif plugin["options"] is not None:
        click.echo("No options.")
    elif plugin["doc"] is not None:
        click.echo("Options are those of a base class in another file.")
    if plugin["scheme"]:
        click.echo(f"\nscheme = {plugin['scheme']}")
    click.echo()


def _table(columns: list[str], rows: list[dict[str, Any]], wraps: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column != wraps, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row[column] is None else row[column]) for column in columns))
    return table


def _print(table: Table) -> None:
    """Fit a terminal; give a pipe whole lines, unless COLUMNS asks for a width."""
    import os
    import sys

    from rich.console import Console

    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if fits else 1000, highlight=False).print(table)
