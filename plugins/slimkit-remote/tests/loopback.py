"""An ssh server on this machine that stands for a board, with keys of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ALIAS = "slimkit-loopback"
"""What the ssh configuration of the tests calls it."""
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
_LIMIT_S = 20


def missing() -> str:
    """Why there can be no server here; empty where there can."""
    if SSHD is None:
        return "needs sshd: apt-get install openssh-server"
    if shutil.which("ssh") is None:
        return "needs ssh: apt-get install openssh-client"
    return ""


class Loopback:
    """A running server; `options` are what the backend needs to reach it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("host", "other", "client"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.known_hosts = self.trusting("host")
        (folder / "authorized").write_text((folder / "client.pub").read_text())
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {folder}/host\n"
            f"AuthorizedKeysFile {folder}/authorized\nPidFile none\nStrictModes no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it
        self._log = (folder / "sshd.log").open("w")
        self._server = subprocess.Popen(
            [str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=self._log
        )
        self._wait()

    def trusting(self, key: str) -> Path:
        """A known_hosts file that takes the server for one with this key."""
        kind, public = (self.folder / f"{key}.pub").read_text().split()[:2]
        path = self.folder / f"known_{key}"
        path.write_text(f"[127.0.0.1]:{self.port} {kind} {public}\n")
        return path

    @property
    def options(self) -> dict[str, Any]:
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "key": str(self.folder / "client"),
            "known_hosts": str(self.known_hosts),
            "python": sys.executable,
        }

    def alias(self) -> Path:
        """A folder with an ``ssh`` that knows the server as `ALIAS`, without any option."""
        (self.folder / "ssh_config").write_text(
            f"Host {ALIAS}\n  HostName 127.0.0.1\n  Port {self.port}\n"
            f"  IdentityFile {self.folder}/client\n  UserKnownHostsFile {self.known_hosts}\n"
        )
        folder = self.folder / "bin"
        folder.mkdir()
        program(folder / "ssh", f'exec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"')
        return folder

    def cut(self) -> None:
        """End what serves the connections that are open, as a board that loses power does."""
        for child in _descendants(self._server.pid):
            os.kill(child, signal.SIGKILL)

    def close(self) -> None:
        self._server.terminate()
        self._server.wait(_LIMIT_S)
        self._log.close()

    def _wait(self) -> None:
        end = time.monotonic() + _LIMIT_S
        while time.monotonic() < end:
            if self._server.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        said = (self.folder / "sshd.log").read_text()
        raise RuntimeError(f"sshd does not listen on port {self.port}: {said}")


def program(path: Path, script: str) -> Path:
    """A shell script to be executed."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def _descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found, fresh = [], [pid]
    while fresh:
        fresh = [child for child, parent in pairs if parent in fresh]
        found += fresh
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """One server for the tests of a file."""
    if reason := missing():
        pytest.skip(reason)
    loopback = Loopback(tmp_path_factory.mktemp("sshd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{loopback.alias()}:{os.environ['PATH']}")
        yield loopback
    loopback.close()
