"""Progress bars for long work, or none in quiet mode."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

_quiet = False


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Inside, no progress bar is drawn."""
    global _quiet
    before, _quiet = _quiet, on or _quiet
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether bars are off: asked for, or standard error is not a terminal."""
    return _quiet or not sys.stderr.isatty()


def line(text: str) -> None:
    """Print one line on standard error, above any bar that is being drawn."""
    if is_quiet():
        print(text, file=sys.stderr, flush=True)
    else:
        _console().print(text, markup=False, highlight=False, soft_wrap=True)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and draw how far it has got on standard error."""
    if is_quiet():
        yield from items
        return
    from rich.progress import track as rich_track

    if total is None and isinstance(items, Sized):
        total = len(items)
    yield from rich_track(items, description=what, total=total, console=_console(), transient=True)


def _console() -> Console:
    """Rich's one global console, on standard error; Lightning's bar draws on it as well."""
    import rich

    if not rich.get_console().stderr:
        rich.reconfigure(stderr=True)
    return rich.get_console()
