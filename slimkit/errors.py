"""Every error that slimkit raises on purpose, and the exit code that the command line gives it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class SlimkitError(Exception):
    """Bad input: the message names the thing, the place and the way out.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe.

    Args:
        path: where, such as ``prune.target.flops``; empty for the whole file.
        message: what is wrong there, and the way out.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class RecipeError(SlimkitError):
    """A recipe cannot be used; the message lists every problem with its path."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__("\n  ".join([message, *map(str, problems)]))
        self.problems = tuple(problems)


class PluginError(SlimkitError):
    """A plugin cannot be found, is broken, or failed while slimkit used it."""


class StoppedError(SlimkitError):
    """The process was asked to end (SIGTERM); the same command goes on."""

    exit_code = 143


class Terminated(SystemExit):  # noqa: N818  (no error: nobody is to catch it)
    """SIGTERM came: what is at work unwinds; no plugin is to blame."""


class DivergedError(SlimkitError):
    """A training went wrong: weights or a loss are NaN or infinite."""


class PruningError(SlimkitError):
    """Nothing was pruned, or the asked target cannot be reached."""


class RewritingError(SlimkitError):
    """A rewrite is unknown, found nothing to do, or changed what the model computes."""


class QuantizationError(SlimkitError):
    """Nothing was quantized, or calibration data or ranges are unusable."""


class ExportError(SlimkitError):
    """A backend cannot compile or run this model."""


class UnavailableError(ExportError):
    """This machine lacks a runtime or a device that a backend needs; the model is not to blame."""


class ArtifactError(SlimkitError):
    """An artifact folder is damaged, incomplete, or does not fit the model."""


class GateError(SlimkitError):
    """The deployed files work but miss a gate of the recipe."""

    exit_code = 3


def in_one_line(error: Exception) -> str:
    r"""The kind of an error and the first line of its text.

    >>> in_one_line(ValueError("no such shape\nsee above"))
    'ValueError: no such shape'
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The way out of a misspelling, to end a message with.

    >>> did_you_mean("tayler", ["l1", "taylor"])
    "; did you mean 'taylor'?"
    >>> did_you_mean("wanda", ["l1", "taylor"])
    '; there are: l1, taylor'
    """
    from difflib import get_close_matches

    spelled = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), spelled, n=1)
    if near:
        return f"; did you mean {spelled[near[0]]!r}?"
    return f"; there are: {', '.join(spelled.values())}" if 0 < len(spelled) <= 12 else ""
