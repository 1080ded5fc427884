"""The `slimkit` command: finds its subcommands lazily and turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import click

from slimkit.errors import SlimkitError, StoppedError, Terminated

# Threads that spin while they wait for each other make small networks several times slower wherever
# another process wants a core as well; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "run": "slimkit.cli.run:run",
    "check": "slimkit.cli.check:check",
    "prune": "slimkit.cli.prune:prune",
    "compare": "slimkit.cli.compare:compare",
    "sensitivity": "slimkit.cli.sensitivity:sensitivity",
    "list-plugins": "slimkit.cli.list_plugins:list_plugins",
    "schema": "slimkit.cli.schema:schema",
    "new-plugin": "slimkit.cli.new_plugin:new_plugin",
}


class _Lazy(click.Group):
    """A group that imports the file of a command when it is called or its help is shown."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=_Lazy)
@click.version_option(package_name="slimkit", message="%(package)s %(version)s")
def slimkit() -> None:
    """Make a trained PyTorch model small and fast, and prove it on the exported file.

    Exit codes: 0 done, 1 a bug, 2 bad input, 3 a gate was missed; 130 Ctrl-C, 143 SIGTERM.
    """


def _unexpected(error: Exception) -> int:
    """Print the traceback and say whose code it came from; give the exit code."""
    import sysconfig
    import traceback

    traceback.print_exception(error)
    ours = os.path.dirname(os.path.dirname(__file__))  # noqa: PTH120  (pathlib is slow to import)
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")}
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    last = max((i for i, name in enumerate(frames) if name.startswith(ours)), default=-1)
    for name in frames[last + 1 :]:
        if not name.startswith((*libraries, "<")):
            message = f"Error: {name} raised {type(error).__name__}: {error} (traceback above)"
            click.echo(message, err=True)
            return SlimkitError.exit_code
    click.echo("This is a bug in slimkit: please report it with the lines above.", err=True)
    return 1


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM unwinds what is at work, which removes what is half-written; once."""

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated(StoppedError.exit_code)

    ours = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main() -> None:
    """Run the command line and exit."""
    try:
        with _stoppable():
            code = slimkit.main(prog_name="slimkit", standalone_mode=False)
            sys.stdout.flush()
    except SlimkitError as error:
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click takes it for Ctrl-D
            code = _unexpected(error.__cause__)
        else:
            click.echo("Interrupted.", err=True)
            code = 130
    except SystemExit as error:
        code = error.code
        if code is None:  # by the code of a model or of data: nothing was finished
            click.echo("Error: something ended the process before it was done", err=True)
            code = SlimkitError.exit_code
        elif code == StoppedError.exit_code:
            click.echo("Error: stopped by SIGTERM: nothing is left half-written", err=True)
    except BrokenPipeError:  # `slimkit list-plugins | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # a full disk, a folder without permission
        click.echo(f"Error: {error}", err=True)
        code = SlimkitError.exit_code
    except Exception as error:
        code = _unexpected(error)
    sys.exit(code)
