"""One ssh process, the runner at its far end, and what to say when either fails."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import select
import shlex
import subprocess
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np

from slimkit.errors import ExportError, UnavailableError
from slimkit_remote import failures
from slimkit_remote.board import CHUNK, HEAD, READY

_START = (
    "import sys; sys.version_info >= (3, 8) or sys.exit('Python 3.8 is needed'); "
    "exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())), 'board.py', 'exec'))"
)
_MOST_GREETING = 1 << 20  # bytes
_MOST_SILENCE_S = 86_400.0
_ALIVE_S, _LOST_AFTER = 5, 3
"""ssh asks every 5 s whether the board is there, and gives up after 3 questions."""


@dataclass(frozen=True)
class Place:
    """Where a board is and how to get in; what is empty or None is up to ssh's own configuration.

    Args:
        host: name or address, or a ``Host`` of the ssh configuration.
        user: who to be there.
        port: of the ssh server.
        key: file of the private key.
        known_hosts: file with the board's public key.
        python: its interpreter.
        folder: where it keeps files while they are used; empty: its temporary folder.
        timeout: seconds of silence after which it is given up.
    """

    host: str
    user: str = ""
    port: int | None = None
    key: str = ""
    known_hosts: str = ""
    python: str = "python3"
    folder: str = ""
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= _MOST_SILENCE_S:
            raise ValueError(
                f"timeout must be over 0 and at most {_MOST_SILENCE_S:,.0f} s, not {self.timeout}"
            )

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"{user}{self.host}" + (f" port {self.port}" if self.port else "")

    def command(self) -> list[str]:
        """Starts the runner there, and asks nobody anything."""
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": max(1, math.ceil(self.timeout)),
            "ServerAliveInterval": _ALIVE_S,
            "ServerAliveCountMax": _LOST_AFTER,
            "LogLevel": "ERROR",
        }
        if self.key:
            options |= {"IdentityFile": Path(self.key).expanduser(), "IdentitiesOnly": "yes"}
        if self.known_hosts:
            options["UserKnownHostsFile"] = Path(self.known_hosts).expanduser()
            options["GlobalKnownHostsFile"] = "/dev/null"
        command = ["ssh", "-T", *(f"-o{name}={_quoted(v)}" for name, v in options.items())]
        command += ["-p", str(self.port)] if self.port else []
        command += ["-l", self.user] if self.user else []
        remote = f"exec {shlex.quote(self.python)} -c {shlex.quote(_START)}"
        return [*command, "--", self.host, remote]


def _quoted(value: object) -> str:
    """A value as ssh's configuration takes it, where blanks part words."""
    return f'"{value}"' if isinstance(value, Path) else str(value)


class Connection:
    """A runner on a board that answers requests until `close`, or until nobody holds this.

    Args:
        place: the board.

    Raises:
        UnavailableError: there is no way in, or no Python behind it.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        try:
            self._process = subprocess.Popen(
                place.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                bufsize=0,
            )
        except FileNotFoundError as error:
            self._said.close()
            raise UnavailableError(
                "the remote backend needs the program ssh: install openssh-client"
            ) from error
        self.close = weakref.finalize(self, _end, self._process, self._said)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        source = resources.files("slimkit_remote").joinpath("board.py").read_bytes()
        doing = "starting the runner"
        self._write(f"{len(source)}\n".encode() + source, doing)
        self._pass_greetings(doing)
        self.threads = int(self.ask(doing, {"do": "hello"})["threads"])
        """How many threads can compute at once on the board."""

    def _pass_greetings(self, doing: str) -> None:
        """Read what the board's shell prints when somebody comes in, up to the runner's sign."""
        said = b""
        while not said.endswith(READY):
            if len(said) > _MOST_GREETING:
                self.close()
                raise UnavailableError(
                    f"the shell of {self.place} prints without end while {doing}: look at what "
                    "its start-up files, such as ~/.bashrc, do for a shell that nobody sits at"
                )
            said += self._piece(CHUNK, doing)

    def ask(
        self, doing: str, request: dict[str, Any], arrays: Sequence[np.ndarray] = ()
    ) -> dict[str, Any]:
        """The answer to a request whose body are arrays.

        Args:
            doing: what is done, for errors, such as ``running the model``.
            request: see `slimkit_remote.board`.
            arrays: what goes with it.

        Returns:
            Its values; the arrays that came with it are under ``arrays``.

        Raises:
            UnavailableError: the board cannot be reached any more, or lacks something.
            ExportError: the runtime refuses the model or fails.
        """
        body = b""
        if arrays:
            buffer = io.BytesIO()
            np.savez(buffer, *arrays)
            body = buffer.getvalue()
        return self._asked(doing, request, len(body), [body])

    def send(self, directory: Path) -> None:
        """Copy all files of a folder to the board, where they last as long as the connection."""
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        files = {str(p.relative_to(directory).as_posix()): p.stat().st_size for p in paths}
        size = sum(files.values())
        request = {"do": "send", "folder": self.place.folder, "files": files}
        doing = f"copying {max(1, size // 1000):,} kB to it"
        self._asked(doing, request, size, _chunks(paths))

    def _asked(
        self, doing: str, request: dict[str, Any], size: int, body: Iterable[bytes]
    ) -> dict[str, Any]:
        if not self.close.alive:
            raise UnavailableError(
                f"the connection to {self.place} was given up before: load the files again"
            )
        text = json.dumps(request).encode()
        self._write(HEAD.pack(len(text), size) + text, doing)
        for chunk in body:
            self._write(chunk, doing)
        while True:
            length, size = HEAD.unpack(self._read(HEAD.size, doing))
            answer: dict[str, Any] = json.loads(self._read(length, doing))
            data = self._read(size, doing)
            if "busy" not in answer:
                break
        if "error" in answer:
            message = failures.told(answer["error"], answer["says"], self.place, doing)
            model = answer["error"] == "model"
            raise ExportError(message) if model else UnavailableError(message)
        if data:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                answer["arrays"] = [found[f"arr_{number}"] for number in range(len(found.files))]
        return answer

    def _write(self, data: bytes, doing: str) -> None:
        """Write all of it; each piece may wait as long as `Place.timeout`."""
        left = memoryview(data)
        while left:
            _, ready, _ = select.select([], [self._in], [], self.place.timeout)
            if not ready:
                self._silent(doing)
            try:
                left = left[os.write(self._in, left[:CHUNK]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise self._lost(doing) from error

    def _read(self, size: int, doing: str) -> bytearray:
        """So many bytes; each piece may wait as long as `Place.timeout`."""
        data = bytearray()
        while len(data) < size:
            data += self._piece(size - len(data), doing)
        return data

    def _piece(self, most: int, doing: str) -> bytes:
        ready, _, _ = select.select([self._out], [], [], self.place.timeout)
        if not ready:
            self._silent(doing)
        piece = os.read(self._out, min(CHUNK, most))
        if not piece:
            raise self._lost(doing)
        return piece

    def _silent(self, doing: str) -> None:
        self.close()
        raise UnavailableError(
            f"{self.place} said nothing for {self.place.timeout:g} s while {doing}: look whether "
            "it is overloaded or hangs, or raise the option timeout"
        )

    def _lost(self, doing: str) -> UnavailableError:
        """What ssh or the board's shell said last, as an error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")
        code = self._process.poll()
        self.close()
        return UnavailableError(failures.lost(code, said, self.place, doing))


def _chunks(paths: Iterable[Path]) -> Iterable[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk


def _end(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    """Close the pipes, upon which the runner leaves, and end ssh where it does not."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    said.close()
