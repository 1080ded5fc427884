"""Progress bars for long work, or none in quiet mode."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

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


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and draw how far it has got on standard error."""
    if is_quiet():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    if total is None and isinstance(items, Sized):
        total = len(items)
    yield from rich_track(
        items, description=what, total=total, console=Console(stderr=True), transient=True
    )
