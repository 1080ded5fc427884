"""What goes to standard output: with --json nothing but JSON, whatever else prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import click

_KEY = "slimkit.stdout"


def json_option(describe: str) -> Callable[..., Any]:
    """The option --json, as the parameter `as_json`; prints of others go to standard error.

    Args:
        describe: its help.
    """

    def aside(ctx: click.Context, _parameter: click.Parameter, value: bool) -> bool:
        if value:
            ctx.meta[_KEY] = sys.stdout
            ctx.with_resource(redirect_stdout(sys.stderr))
        return value

    return click.option("--json", "as_json", is_flag=True, callback=aside, help=describe)


def emit(text: str) -> None:
    """Print to standard output, with --json as well."""
    click.echo(text, file=click.get_current_context().meta.get(_KEY))
