"""Silence for libraries that print, and what they would have said."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """No prints, warnings or log lines inside the block; errors still arrive as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """Inside, what Python and C code write to the terminal goes into what is called afterwards."""
    heard: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file, io.StringIO() as text:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield lambda: "".join(heard)
        finally:
            for number, old in enumerate(before, start=1):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            heard += [text.getvalue(), file.read().decode(errors="replace")]
