"""Keeps what a LightningModule logs from its trainer, for steps that run outside of a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl


@contextmanager
def logged(inner: pl.LightningModule, take: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside, what `inner` logs goes to `take` with its name; afterwards it logs as before.

    Args:
        inner: `log`, which `log_dict` calls, is replaced for that long; such blocks may nest.
        take: called with each name and value.
    """

    def log(name: str, value: Any, *_args: Any, **_kwargs: Any) -> None:
        take(name, value)

    before = vars(inner).get("log")
    inner.log = log  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del inner.log
        else:
            inner.log = before  # type: ignore[method-assign]
