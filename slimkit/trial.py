"""What a trial made, so that the real thing need not make it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from slimkit.errors import ExportError, UnavailableError

T = TypeVar("T")


class Trial(Generic[T]):
    """Keeps what was made of one thing for as long as that thing lives, and gives it out once.

    A backend that compiles on trial to find what stands in the way (`Backend.check`) keeps the
    result here for `Backend.compile`.

    >>> class Thing: ...
    >>> trial, thing = Trial[str](), Thing()
    >>> trial.keep(thing, "made of it")
    >>> trial.look(thing, lambda: "made again")
    'made of it'
    >>> trial.take(Thing()), trial.take(thing), trial.take(thing)
    (None, 'made of it', None)
    """

    def __init__(self) -> None:
        self._of: weakref.ref[object] | None = None
        self._made: T | None = None

    def keep(self, of: object, made: T) -> None:
        """Remember what was made of `of`; what was kept before is forgotten."""
        self._of, self._made = weakref.ref(of, self._forget), made

    def take(self, of: object) -> T | None:
        """What was made of this very thing, if it was the last; not again."""
        if self._of is None or self._of() is not of:
            return None
        made = self._made
        self._forget()
        return made

    def look(self, of: object, make: Callable[[], T]) -> T:
        """What was made of this thing, or what `make` makes of it now; kept as it was."""
        made = self.take(of)
        made = make() if made is None else made
        self.keep(of, made)
        return made

    def refused(self, of: object, make: Callable[[], T]) -> list[str]:
        """What `make` says against this thing: nothing where it makes one, which is kept.

        Raises:
            UnavailableError: the machine is to blame, and not the thing.
        """
        try:
            self.keep(of, make())
        except UnavailableError:
            raise
        except ExportError as error:
            return [str(error)]
        return []

    def _forget(self, _dead: object = None) -> None:
        self._of, self._made = None, None
