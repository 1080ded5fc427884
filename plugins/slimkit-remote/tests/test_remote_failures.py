"""What goes wrong between here and a board is said in one line: the thing, the place, the way."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import Loopback, program, server
from slimkit_remote.backend import Remote
from torch import nn

from slimkit.deploy.deployed import compile_
from slimkit.deploy.memory import peaks
from slimkit.deploy.preflight import preflight
from slimkit.errors import ExportError, UnavailableError
from slimkit.importing import backend_named

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A compiled network."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    compile_(net, backend_named("onnxruntime"), (X,), tmp_path / "files")
    return tmp_path / "files"


def message(files: Path, options: dict[str, Any]) -> str:
    with pytest.raises(UnavailableError) as caught:
        Remote(**options).load(files)(X)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def python(path: Path, runtime: str) -> str:
    """An interpreter whose onnxruntime is made of these lines."""
    (path / "fake").mkdir()
    (path / "fake" / "onnxruntime.py").write_text(runtime)
    script = f'PYTHONPATH={path}/fake exec {sys.executable} "$@"'
    return str(program(path / "python-fake", script))


SESSION = """
import time
class SessionOptions:
    def add_session_config_entry(self, *_): pass
class Input:
    name = "x"
class InferenceSession:
    def __init__(self, *_, **__): pass
    def get_inputs(self): return [Input]
    def run(self, _outputs, feed):
        {}
        return list(feed.values())
"""


def test_no_host(files: Path) -> None:
    assert message(files, {}) == (
        "the remote backend has no host: set its option host to a board's name or address"
    )


def test_a_board_that_is_off_is_known_before_training() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    for found in preflight(net, (X,), {"remote": Remote(host="127.0.0.1", port=9, timeout=5)}):
        (problem,) = found.problems
        assert "127.0.0.1 port 9" in problem


def test_another_host_key(server: Loopback, files: Path) -> None:
    known = server.trusting("other")
    found = message(files, {**server.options, "known_hosts": str(known)})
    assert found == (
        f"127.0.0.1 port {server.port} shows another host key than the one in {known}: if the "
        "board was set up anew, remove the old key with "
        f"`ssh-keygen -R '[127.0.0.1]:{server.port}' -f {known}` and add the new one; if not, "
        "something else answers in its place"
    )


def test_an_unknown_host_key(server: Loopback, files: Path, tmp_path: Path) -> None:
    (tmp_path / "none").touch()
    found = message(files, {**server.options, "known_hosts": str(tmp_path / "none")})
    assert found.startswith(
        f"the host key of 127.0.0.1 port {server.port} is not in {tmp_path}/none: compare what "
    )


def test_a_key_that_lets_nobody_in(server: Loopback, files: Path) -> None:
    found = message(files, {**server.options, "key": str(server.folder / "other")})
    assert found.startswith(f"127.0.0.1 port {server.port} does not let this user in: append ")


def test_nothing_listens(server: Loopback, files: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert message(files, {**server.options, "port": port}) == (
        f"nothing answers ssh at 127.0.0.1 port {port}: start sshd there, or correct the options "
        "host and port"
    )


def test_what_listens_never_answers(server: Loopback, files: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        found = message(files, {**server.options, "port": port, "timeout": 1.0})
    assert f"127.0.0.1 port {port}" in found
    assert "raise the option timeout" in found


def test_no_python(server: Loopback, files: Path) -> None:
    assert message(files, {**server.options, "python": "python-of-nobody"}) == (
        f"127.0.0.1 port {server.port} has no program 'python-of-nobody': install Python 3.8 or "
        "newer there, or set the option python to its path"
    )


def test_no_runtime(server: Loopback, files: Path, tmp_path: Path) -> None:
    bare = python(tmp_path, "raise ModuleNotFoundError(\"No module named 'onnxruntime'\")")
    assert message(files, {**server.options, "python": bare}) == (
        f"127.0.0.1 port {server.port} lacks onnxruntime for '{bare}' (ModuleNotFoundError: No "
        f"module named 'onnxruntime'): {bare} -m pip install onnxruntime there, or set the option "
        "python to an interpreter that has it"
    )


def test_a_shell_that_greets_is_passed_over(server: Loopback, files: Path, tmp_path: Path) -> None:
    greets = program(
        tmp_path / "greets", f'echo "Welcome to the board"; exec {sys.executable} "$@"'
    )
    expected = backend_named("onnxruntime").load(files)(X)
    found = Remote(**{**server.options, "python": str(greets)}).load(files)(X)
    assert torch.equal(found[0], expected[0])


def test_a_shell_that_prints_without_end(server: Loopback, files: Path, tmp_path: Path) -> None:
    endless = str(program(tmp_path / "endless", "exec yes Welcome"))
    found = message(files, {**server.options, "python": endless})
    assert "prints without end while starting the runner: look at what" in found


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 1e12])
def test_a_timeout_that_is_none(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be over 0 and at most 86,400 s, not"):
        Remote(host="board", timeout=timeout)


def test_a_full_disk(server: Loopback, files: Path, tmp_path: Path) -> None:
    small = program(tmp_path / "python", f'ulimit -f 8; exec {sys.executable} "$@"')
    found = message(files, {**server.options, "python": str(small), "folder": str(tmp_path)})
    size = (files / "model.onnx").stat().st_size // 1000
    assert found == (
        f"the disk of 127.0.0.1 port {server.port} is full at {tmp_path} while copying {size} kB "
        "to it (OSError: [Errno 27] File too large): free space there, or set the option folder "
        "to a disk that has some"
    )
    assert not list(tmp_path.glob("slimkit-*"))


def test_a_folder_that_is_not_there(server: Loopback, files: Path, tmp_path: Path) -> None:
    found = message(files, {**server.options, "folder": str(tmp_path / "none")})
    assert f"cannot keep files in {tmp_path}/none while copying" in found
    assert "set the option folder" in found


def test_a_run_that_hangs(server: Loopback, files: Path, tmp_path: Path) -> None:
    sleeps = python(tmp_path, SESSION.format("time.sleep(100)"))
    (tmp_path / "board").mkdir()
    options = {**server.options, "python": sleeps, "folder": str(tmp_path / "board")}
    found = message(files, {**options, "timeout": 3.0})
    assert found == (
        f"127.0.0.1 port {server.port} said nothing for 3 s while running the model: look whether "
        "it is overloaded or hangs, or raise the option timeout"
    )
    end = time.monotonic() + 15
    while list((tmp_path / "board").iterdir()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not list((tmp_path / "board").iterdir())  # the run was ended there, too


def test_long_timing_is_no_silence(server: Loopback, files: Path, tmp_path: Path) -> None:
    slow = python(tmp_path, SESSION.format("time.sleep(0.4)"))
    run = Remote(**{**server.options, "python": slow, "timeout": 3.0}).load(files)
    times = run.times((X,), 10)
    assert len(times) == 10
    assert min(times) >= 400


def test_a_server_that_is_killed_in_the_middle(
    server: Loopback, files: Path, tmp_path: Path
) -> None:
    sleeps = python(tmp_path, SESSION.format("time.sleep(8)"))
    run = Remote(**{**server.options, "python": sleeps}).load(files)
    timer = threading.Timer(1.0, server.cut)
    timer.start()
    with pytest.raises(UnavailableError) as caught:
        run(X)
    timer.join()
    found = str(caught.value)
    assert len(found.splitlines()) == 1
    assert found.startswith(
        f"the connection to 127.0.0.1 port {server.port} was lost while running the model ("
    )
    assert found.endswith("look whether the board and its network are up, and start again")
    with pytest.raises(UnavailableError, match="was given up before: load the files again"):
        run(X)


def test_a_runtime_that_refuses_the_file(server: Loopback, files: Path) -> None:
    (files / "model.onnx").write_bytes(b"no model")
    with pytest.raises(
        ExportError, match=r"failed while opening the model of \S+: \w+: "
    ) as caught:
        Remote(**server.options).load(files)
    assert not isinstance(caught.value, UnavailableError)


def test_an_error_of_a_run_leaves_the_connection_open(server: Loopback, files: Path) -> None:
    run = Remote(**server.options).load(files)
    with pytest.raises(ExportError, match="the model takes 1 inputs, 2 were given"):
        run(X, X)
    assert run(X)[0].shape == (1, 64, 4, 4)


def test_memory_that_cannot_be_measured_has_its_reason(files: Path) -> None:
    found = peaks({"there": (Remote(), files)}, (X,))["there"]
    assert found.bytes is None
    assert found.problem.startswith("UnavailableError: the remote backend has no host")
