"""Results of long work, each written down when it is known, so that a killed run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from slimkit.errors import SlimkitError

T = TypeVar("T")


class Journal(Generic[T]):
    """A file of JSON lines: what the work is about, and then one result a line.

    Args:
        path: the file.
        key: a hash of everything that the results depend on.
        read: makes a result of a line; raises ValueError, TypeError, KeyError or AttributeError
            where it is none.
        say: told where a file of something else, or a damaged one, is not gone on from.

    Raises:
        SlimkitError: the file cannot be read.
    """

    def __init__(
        self, path: Path, key: str, read: Callable[[Any], T], say: Callable[[str], None]
    ) -> None:
        self.path, self.key = path, key
        self.header: dict[str, Any] = {}
        self.results: list[T] = []
        if not path.is_file():
            return
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise SlimkitError(f"{path} cannot be read: {error.strerror}") from error
        good = 0
        for good, line in enumerate(lines):  # noqa: B007  # how many came before
            try:
                entry = json.loads(line)
                if good:
                    self.results.append(read(entry))
                elif entry["key"] != key:
                    say(f"{path} is of another model, data or options: starting over")
                    return
                else:
                    self.header = entry
            except (ValueError, TypeError, KeyError, AttributeError):
                break
        else:
            return
        if good == 0:
            say(f"{path} is damaged: starting over")
            return
        if good < len(lines) - 1:  # the last line may be half of one where the run was killed
            say(f"{path} is damaged in line {good + 1}: what comes behind is computed again")
        self._write("".join(line + "\n" for line in lines[:good]))

    def start(self, header: Mapping[str, Any] | None = None) -> None:
        """Begin the file, unless it is gone on from."""
        if not self.header:
            self.header = {"key": self.key, **(header or {})}
            self._write(json.dumps(self.header) + "\n")

    def add(self, entry: Any) -> None:
        """Write a result down."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _write(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f"{self.path.name}.partial")
        aside.write_text(text, encoding="utf-8")
        aside.replace(self.path)
