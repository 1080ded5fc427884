"""What a board computes and measures is what the same files do here."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loopback import Loopback, program, server
from slimkit_remote.backend import Remote
from torch import Tensor, nn

import slimkit
from slimkit.deploy.deployed import Deployed, compile_
from slimkit.deploy.measurement import measure, usable_threads
from slimkit.deploy.memory import peaks
from slimkit.deploy.reopening import reopen
from slimkit.importing import backend_named
from slimkit.interfaces import Backend, TimedRunner

SLOW_S = 0.05


def network() -> nn.Module:
    body = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)).eval()


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Case:
    """A quantized network, compiled by the remote backend and opened there and here."""

    def __init__(self, server: Loopback, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.remote = Remote(backend=kind, **server.options)
        self.local: Backend = backend_named(kind)
        self.model = slimkit.quantize(network(), [X], self.remote, activations="minmax")
        self.folder = folder / kind
        self.deployed: Deployed = compile_(self.model, self.remote, (X,), self.folder)[1]


@pytest.fixture(scope="module", params=["onnxruntime", "ncnn"])
def case(
    request: pytest.FixtureRequest, server: Loopback, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    return Case(server, request.param, tmp_path_factory.mktemp("files"))


def test_outputs_are_those_of_the_same_files_here(case: Case) -> None:
    here = case.local.load(case.folder)
    expected = torch.cat([here(X[i : i + 1])[0] for i in range(len(X))])
    assert torch.equal(case.deployed.flat(X)[0], expected)


def test_operators_and_their_names_are_those_of_the_same_runtime_here(case: Case) -> None:
    assert case.remote.operators(case.folder) == case.local.operators(case.folder)


def test_profile_times_every_operator(case: Case) -> None:
    found = case.remote.profile(case.folder, (X[:1],))
    expected = case.local.profile(case.folder, (X[:1],))
    assert found.keys() == expected.keys()
    assert all(ms > 0 for ms in found.values())


@pytest.mark.slow
def test_peak_memory_is_near_what_is_measured_here(case: Case) -> None:
    found = peaks(
        {"there": (case.remote, case.folder), "here": (case.local, case.folder)}, (X[:1],)
    )
    assert found["there"].problem == found["here"].problem == ""
    assert abs(found["there"].bytes - found["here"].bytes) < 8 * 2**20


def test_scheme_and_channels_are_those_of_the_backend_that_compiles(case: Case) -> None:
    assert case.remote.scheme == case.local.scheme
    assert case.remote.channel_multiple == case.local.channel_multiple


def test_the_board_says_how_many_threads_it_has(case: Case) -> None:
    assert case.remote.threads() == usable_threads()  # the board is this machine


@pytest.fixture
def slow_way(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of an answer takes a while to come back from the board."""
    delay = tmp_path / "delay.py"
    delay.write_text(
        "import os, sys, time\n"
        "while data := os.read(0, 1 << 20):\n"
        f"    time.sleep({SLOW_S})\n"
        "    while data: data = data[os.write(1, data):]\n"
    )
    way = tmp_path / "way"
    way.mkdir()
    program(way / "ssh", f'/usr/bin/env ssh-direct "$@" | {sys.executable} {delay}')
    which = subprocess.run(["which", "ssh"], capture_output=True, text=True, check=True)
    (way / "ssh-direct").symlink_to(which.stdout.strip())
    monkeypatch.setenv("PATH", str(way), prepend=":")


@pytest.mark.usefixtures("slow_way")
def test_latency_leaves_the_network_out(server: Loopback, tmp_path: Path) -> None:
    run = compile_(network(), Remote(**server.options), (X,), tmp_path / "files")[1].runner
    assert isinstance(run, TimedRunner)
    start = time.perf_counter()
    run(X[:1])
    assert time.perf_counter() - start > SLOW_S
    found = measure({"there": run}, (X[:1],), seconds=0.05, most_runs=50)["there"]
    assert 0 < found.median_ms < 1000 * SLOW_S / 2
    assert found.runs >= 30


def test_nothing_stays_on_the_board(server: Loopback, tmp_path: Path) -> None:
    there = tmp_path / "board"
    there.mkdir()
    backend = Remote(folder=str(there), **server.options)
    run = compile_(network(), backend, (X,), tmp_path / "files")[1].runner
    assert [path.name for path in there.glob("*/*")] == ["model.onnx"]
    run(X[:1])
    del run
    gc.collect()
    end = time.monotonic() + 10
    while list(there.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert list(there.iterdir()) == []


def test_an_artifact_is_opened_on_the_board_that_it_was_made_with(
    server: Loopback, tmp_path: Path
) -> None:
    remote = Remote(backend="ncnn", **server.options)
    slimkit.export(network(), X, remote, directory=tmp_path / "a")
    (opened,) = reopen(tmp_path / "a")
    assert opened.backend.place == remote.place
    assert opened.backend.runtime == "ncnn"
    assert opened.agreement([X]).share == 1.0


def test_a_large_input_passes_whole(server: Loopback, tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(1, 3, 1000, 1000)  # 12 MB, many times what a pipe holds
    run = compile_(Sum().eval(), Remote(**server.options), (x,), tmp_path / "files")[1]
    assert torch.equal(run(x), x * 2)
