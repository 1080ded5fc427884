"""Measures the memory that running a file takes, in a process that holds nothing else.

A process is started that imports torch and what the backend is made of, then a child is forked for
each file. The child opens the file, runs it, and the system says how much memory it ever held. The
peak of one more child, in which the backend finds no file, is taken away: what is left is the file,
and the part of the runtime that only works while it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from slimkit.errors import in_one_line
from slimkit.interfaces import Backend

RUNS = 3
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from slimkit.deploy.memory import serve; serve()"
)


@dataclass(frozen=True)
class Peak:
    """The most memory that a file ever needed, or why it is not known.

    Args:
        bytes: resident memory beyond that of a process in which the backend has no file.
        problem: why there is no number; empty if there is.
    """

    bytes: int | None
    problem: str = ""


def peaks(
    files: Mapping[str, tuple[Backend, Path]],
    inputs: tuple[Tensor, ...],
    *,
    timeout_s: float = 60.0,
) -> dict[str, Peak]:
    """Run each file a few times on one thread, in a process of its own, and measure its memory.

    A backend that runs its files elsewhere is asked for what they need there.

    Args:
        files: by name, the backend and its compiled folder.
        inputs: tensors for one run.
        timeout_s: for each file.

    Returns:
        By the same names. Never raises for a file that fails: its problem says what happened.
    """
    told = {name: _told(*file, inputs) for name, file in files.items()}
    files = {name: file for name, file in files.items() if told[name] is None}
    elsewhere = {name: peak for name, peak in told.items() if peak is not None}
    return elsewhere | (_measured(files, inputs, timeout_s) if files else {})


def _told(backend: Backend, directory: Path, inputs: tuple[Tensor, ...]) -> Peak | None:
    """What a backend says itself; None where this machine is where to measure."""
    try:
        found = backend.peak_bytes(directory, inputs)
    except Exception as error:  # of a device or a plugin; the other files are measured all the same
        return Peak(None, in_one_line(error))
    return None if found is None else Peak(found)


def _measured(
    files: Mapping[str, tuple[Backend, Path]], inputs: tuple[Tensor, ...], timeout_s: float
) -> dict[str, Peak]:
    def all_for(reason: str) -> dict[str, Peak]:
        return dict.fromkeys(files, Peak(None, reason))

    if not hasattr(os, "fork"):
        return all_for(f"processes cannot be forked on {sys.platform}")
    found: dict[str, int | str] = {}
    sent: dict[str, tuple[str, bytes, Path]] = {}
    for name, (backend, directory) in files.items():
        try:
            sent[name] = (_kind(backend), pickle.dumps(backend), directory)
        except Exception as error:  # whatever a backend's __reduce__ raises
            found[name] = f"the backend cannot be sent to another process: {in_one_line(error)}"
    order = pickle.dumps((sent, inputs, timeout_s))
    command = [sys.executable, "-c", _START, json.dumps(sys.path)]
    try:
        done = subprocess.run(
            command, input=order, capture_output=True, check=False,
            timeout=60 + 2 * timeout_s * len(files),
        )  # fmt: skip
        found |= json.loads(done.stdout)
    except (subprocess.TimeoutExpired, OSError) as error:
        return all_for(in_one_line(error))
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
        return all_for(f"the measuring process failed (code {done.returncode}): {last[-1]}")
    return {
        name: Peak(None, value) if isinstance(value := found[name], str) else Peak(value)
        for name in files
    }


def _kind(backend: Backend) -> str:
    return f"{type(backend).__module__}:{type(backend).__qualname__}"


def serve() -> None:
    """Measure what standard input asks for, print bytes or problems as JSON: a process's main."""
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what runtimes print
        sent, inputs, timeout_s = pickle.load(sys.stdin.buffer)
        empty: dict[str, int | str] = {}
        found: dict[str, int | str] = {}
        for name, (kind, pickled, directory) in sent.items():
            if kind not in empty:
                empty[kind] = _peak(pickled, None, inputs, timeout_s)
            base, peak = empty[kind], _peak(pickled, directory, inputs, timeout_s)
            if isinstance(peak, int) and isinstance(base, int):
                found[name] = max(0, peak - base)
            else:
                found[name] = base if isinstance(base, str) else peak
        json.dump(found, answer)


def _peak(
    pickled: bytes, directory: Path | None, inputs: tuple[Tensor, ...], timeout_s: float
) -> int | str:
    """Largest resident memory of a child that opens and runs the file, in bytes, or its problem."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            _child(pickled, directory, inputs, timeout_s, said.fileno())
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        problem = said.read().decode(errors="replace")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGALRM:
            return f"it ran longer than {timeout_s:g} s"
        return f"it was ended by {signal.Signals(number).name}"
    if os.WEXITSTATUS(status):
        return problem or "it failed"
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _child(
    pickled: bytes,
    directory: Path | None,
    inputs: tuple[Tensor, ...],
    timeout_s: float,
    said: int,
) -> None:
    """Open the file, run it, and leave without a word to anything that was inherited."""
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        backend: Backend = pickle.loads(pickled)
        if directory is None:
            with tempfile.TemporaryDirectory() as nothing, contextlib.suppress(Exception):
                backend.load(Path(nothing))  # imports the runtime, then finds no file
        else:
            run = backend.load(directory)
            for _ in range(RUNS):
                run(*inputs)
    except BaseException as error:
        reason = in_one_line(error) if isinstance(error, Exception) else type(error).__name__
        os.write(said, reason.encode())
        os._exit(1)
    os._exit(0)
