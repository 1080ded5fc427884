"""A board behind ssh: another backend compiles here, the board runs, times and measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from slimkit.errors import ExportError, UnavailableError
from slimkit.importing import backend_named
from slimkit.interfaces import Backend, Deployable, TimedRunner
from slimkit.onnx_sessions import summed_bits
from slimkit_remote.connection import Connection, Place

_BITS: dict[Place, int | None] = {}  # boards that were asked what they sum rightly
_PEAK_RUNS, _WARM_UP, _PROFILED = 3, 5, 20


class Remote(Backend):
    """The files of `onnxruntime` or `ncnn`, compiled here and run on a board behind ssh.

    The board needs an ssh server, Python 3.8 or newer, numpy and the runtime; no torch and nothing
    of slimkit. A small runner is sent there with the files, and both are gone once the connection
    is. Latency, peak memory, the number of threads and, for ONNX Runtime, the operators and their
    times are the board's own, without the network; accuracy and agreement are of what it computes.

    Nobody is asked for a password or to trust a host: a key lets this user in, and the board's
    host key must be known.

    Args:
        host: name or address of the board, or a ``Host`` of ``~/.ssh/config``.
        backend: what compiles, and what the board has.
        user: who to be there; left out, as ssh decides.
        port: of its ssh server; left out, as ssh decides.
        key: file of the private key; left out, as ssh decides.
        known_hosts: file with the board's host key; left out, ssh's own.
        python: the interpreter on the board.
        folder: on the board, where files lie while they are used; left out, its temporary folder.
        timeout: seconds; a board that says nothing for longer is given up.
    """

    def __init__(
        self,
        *,
        host: str = "",
        backend: Literal["onnxruntime", "ncnn"] = "onnxruntime",
        user: str = "",
        port: int | None = None,
        key: str = "",
        known_hosts: str = "",
        python: str = "python3",
        folder: str = "",
        timeout: float = 60.0,
    ) -> None:
        self.runtime = backend
        self.place = Place(host, user, port, key, known_hosts, python, folder, timeout)
        vars(self).update(asdict(self.place), backend=backend)  # for an artifact to hold
        self._local = backend_named(backend)
        # facts of the class elsewhere, here of what it stands on
        self.scheme = self._local.scheme  # type: ignore[misc]
        self.channel_multiple = self._local.channel_multiple  # type: ignore[misc]
        self.least_db = self._local.least_db  # type: ignore[misc]
        self._threads: int | None = None

    def check(self, deployable: Deployable) -> list[str]:
        """What the compiling backend says; the board is asked once whether it can be reached.

        Raises:
            UnavailableError: it cannot, or lacks Python or a package.
        """
        self.threads()
        return self._local.check(deployable)

    def remarks(self, deployable: Deployable) -> list[str]:
        """What the compiling backend says."""
        return self._local.remarks(deployable)

    def weight_bits(self) -> int | None:
        """What the board's ONNX Runtime sums rightly, asked there once a process; of ncnn, its own.

        Where the board cannot be reached, nothing is known: `check` says so.
        """
        if self.runtime != "onnxruntime":
            return self._local.weight_bits()
        if self.place not in _BITS:
            try:
                _BITS[self.place] = summed_bits(self.load)
            except ExportError:
                _BITS[self.place] = None
        return _BITS[self.place]

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write the compiling backend's files."""
        self._local.compile(deployable, directory)

    def load(self, directory: Path, threads: int = 1) -> TimedRunner:
        """Copy the files to the board and open them there.

        Raises:
            UnavailableError: the board cannot be reached, or lacks Python, a package or disk space.
            ExportError: its runtime refuses the files.
        """
        connection = self._connected()
        request = {"do": "open", "runtime": self.runtime, "threads": threads}
        try:
            connection.send(directory)
            connection.ask(f"opening the model of {directory}", request)
        except ExportError:
            connection.close()
            raise
        return _Runner(connection)

    def threads(self) -> int:
        """The processors that the board's Python may use."""
        if self._threads is None:
            connection = self._connected()
            self._threads = connection.threads
            connection.close()
        return self._threads

    def peak_bytes(self, directory: Path, inputs: tuple[Tensor, ...]) -> int:
        """What two processes of the board held at most, with the files less without them."""
        limit = math.ceil(self.place.timeout)
        request = {"do": "peak", "runtime": self.runtime, "runs": _PEAK_RUNS, "limit": limit}
        answer = self._once(directory, "measuring memory", request, _arrays(inputs))
        return int(answer["bytes"])

    def operators(self, directory: Path) -> dict[str, int]:
        """Of ONNX Runtime, what the board executes; of ncnn, what is in the file."""
        if self.runtime != "onnxruntime":
            return self._local.operators(directory)
        request = {"do": "profile", "warm_up": 0, "runs": 1}
        return dict(self._once(directory, "counting operators", request)["operators"])

    def profile(self, directory: Path, inputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Times by ONNX Runtime's profiler on the board: the median of 20 runs; none of ncnn."""
        if self.runtime != "onnxruntime":
            return {}
        request = {"do": "profile", "warm_up": _WARM_UP, "runs": _PROFILED}
        return dict(self._once(directory, "profiling", request, _arrays(inputs))["ms"])

    def _connected(self) -> Connection:
        if not self.place.host:
            raise UnavailableError(
                "the remote backend has no host: set its option host to a board's name or address"
            )
        return Connection(self.place)

    def _once(
        self,
        directory: Path,
        doing: str,
        request: dict[str, Any],
        arrays: Sequence[np.ndarray] = (),
    ) -> dict[str, Any]:
        """The answer to one request about the files, over a connection of its own."""
        connection = self._connected()
        try:
            connection.send(directory)
            return connection.ask(doing, request, arrays)
        finally:
            connection.close()


class _Runner:
    """An opened model on a board."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        answer = self._connection.ask("running the model", {"do": "run"}, _arrays(inputs))
        return [torch.from_numpy(array) for array in answer["arrays"]]

    def times(self, inputs: tuple[Tensor, ...], runs: int) -> list[float]:
        """Milliseconds of each run, by the board's clock."""
        request = {"do": "time", "runs": runs}
        return list(self._connection.ask("timing the model", request, _arrays(inputs))["ms"])


def _arrays(inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    return [tensor.detach().cpu().numpy() for tensor in inputs]
