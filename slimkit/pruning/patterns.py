"""Name patterns of layers, as `protect` and `ratios` take them: what they cover."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn

from slimkit.errors import PruningError, did_you_mean


def covers(pattern: str, layers: Iterable[str]) -> bool:
    """Whether a pattern names one of `layers`, or a block around one.

    >>> covers("stage1", ["stage1.conv"]), covers("*.conv", ["stage1.conv"]), covers("s", ["stem"])
    (True, True, False)
    """
    names = list(layers)
    return bool(fnmatch.filter(names, pattern) or fnmatch.filter(names, f"{pattern}.*"))


def check_pattern(option: str, pattern: str, model: nn.Module) -> None:
    """Refuse a pattern that names no layer of the model.

    Raises:
        PruningError: it names none; the message has the nearest name.
    """
    names = [name for name, _ in model.named_modules() if name]
    if not fnmatch.filter(names, pattern):
        hint = did_you_mean(pattern, names)
        raise PruningError(f"{option}: no layer of the model is called {pattern!r}{hint}")
