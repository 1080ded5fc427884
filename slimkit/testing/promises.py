"""What a promise is, on which cases it is tried, and how a broken one is told."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from slimkit.errors import UnavailableError

Case = TypeVar("Case")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Subject:
    """One plugin with one set of options; or a package with all of its plugins.

    Args:
        kind: a kind of plugin, or ``package``.
        name: of the plugin or the package.
        package: the distribution that it came with.
        version: of that.
        make: builds the plugin (a quantizer from its grid); of a package, lists its subjects.
        target: ``package.module:Class``; empty for a package.
        options: what `make` passes to the constructor.
    """

    kind: str
    name: str
    package: str
    version: str
    make: Callable[..., Any]
    target: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The front part of a check's id, such as ``criterion:my-taylor(power=2.0)``."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.kind}:{self.name}" + (f"({options})" if options else "")

    def __str__(self) -> str:
        if self.kind == "package":
            return f"package {self.name} {self.version}"
        options = f" with options {dict(self.options)}" if self.options else ""
        return f"{self.kind} {self.name!r} of {self.package} {self.version}{options}"


@dataclass(frozen=True)
class Promise:
    """One thing that slimkit relies on.

    Args:
        name: the end of a check's id.
        says: the promise in words.
        cases: what it is tried on, the smallest first.
        breach: tries one case; says what came where the promise is broken, else None.
    """

    name: str
    says: str
    cases: Callable[[Subject], Iterable[Any]]
    breach: Callable[[Subject, Any], str | None]

    def broken(self, subject: Subject) -> Broken | None:
        """The first, that is the smallest, case in which the promise does not hold.

        Raises:
            UnavailableError: this machine lacks the runtime or the device.
        """
        case: Any = None
        try:
            for case in self.cases(subject):
                came = self.breach(subject, case)
                if came is not None:
                    return Broken(self, subject, came, str(case))
        except UnavailableError:
            raise
        except (Exception, SystemExit) as error:
            return Broken(self, subject, _raised(error), str(case or "before the first case"))
        return None if case is not None else Broken(self, subject, "nothing to try it on", "none")


@dataclass(frozen=True)
class Broken:
    """A promise that does not hold: what was promised, what came, and the smallest case."""

    promise: Promise
    subject: Subject
    came: str
    case: str

    def __str__(self) -> str:
        lines = [f"{self.subject} breaks the promise {self.promise.name}", ""]
        for title in ("promised", "came", "case"):
            says = textwrap.fill(self.promise.says, 88)
            text = says if title == "promised" else getattr(self, title)
            lines.append(textwrap.indent(text, " " * 10).replace(" " * 10, f"{title:<10}", 1))
        return "\n".join(lines)


Breach = Callable[[Subject, Case], str | None]


class Promises(list[Promise]):
    """The promises of one kind of plugin, in the order of their definition."""

    def on(self, cases: Callable[[Subject], Iterable[Case]]) -> Callable[[Breach[Case]], Promise]:
        """Add a function as a promise: its name is the id, its docstring what is promised.

        Args:
            cases: gives the cases to try, the smallest first.
        """

        def add(breach: Breach[Case]) -> Promise:
            says = " ".join((breach.__doc__ or "").split())
            promise = Promise(breach.__name__, says, cases, breach)
            self.append(promise)
            return promise

        return add


def _raised(error: BaseException) -> str:
    """An exception with the frames that are not the suite's own."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).parent != _HERE
    ]
    told = "".join(traceback.format_exception_only(error)).strip()
    where = "".join(traceback.format_list(frames[-6:])).rstrip()
    cause = f"\ncaused by {_raised(error.__cause__)}" if error.__cause__ else ""
    return f"{told}\n{where}".rstrip() + cause
