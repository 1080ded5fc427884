"""A recipe that exports to this machine and to a board, from training to the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from little_project import MODULE
from loopback import Loopback, server

from slimkit.importing import backend_named
from slimkit.recipe import PluginRef, Quantize
from slimkit.training.quantization import scheme_of


def run(folder: Path, remote: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """`slimkit run` in a fresh process."""
    (folder / "mine.py").write_text(MODULE)
    recipe = {
        "model": "mine:net",
        "data": "mine:Data",
        "task": "classification",
        "prune": {"criterion": "l1", "target": {"flops": 0.6}, "during": [0.0, 0.5]},
        "quantize": {"weights": "minmax", "activations": "minmax", "train_from": 0.5},
        "export": ["onnxruntime", {"name": "remote", "options": remote}],
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "seed": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = os.pathsep.join(part for part in sys.path if part)
    return subprocess.run(
        [sys.executable, "-m", "slimkit", "run", "recipe.yaml", "--output", "out"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "ncnn"])
def test_a_recipe_exports_to_a_board(server: Loopback, tmp_path: Path, backend: str) -> None:
    done = run(tmp_path, {**server.options, "backend": backend})
    assert done.returncode == 0, done.stderr + done.stdout
    manifest = json.loads((tmp_path / "out" / "slimkit.json").read_text())
    rows = {(row["stage"], row["runtime"]): row for row in manifest["metrics"]["rows"]}
    assert len(rows) == 6  # three stages, here and there
    for stage in ("dense", "compressed", "int8"):
        here, there = rows[stage, "onnxruntime"], rows[stage, "remote"]
        assert there["agreement"]["top1"] >= 0.95
        assert there["unmeasured"] == {}
        assert 0 < there["peak_bytes"] < 100 * 2**20
        assert there["threads"] == here["threads"]  # the board is this machine
        # the way there and back takes a millisecond or more
        assert 0 < there["latency"]["median_ms"] < 1
        if backend == "onnxruntime":
            assert there["operators"] == here["operators"]
            assert there["size_bytes"] == here["size_bytes"]
            assert there["metric"] == pytest.approx(here["metric"])
    assert any("int8" in n or n.startswith("QLinear") for n in rows["int8", "remote"]["operators"])
    assert sorted(path.name for path in (tmp_path / "out" / "exports").iterdir()) == [
        "onnxruntime",
        "remote",
    ]


@pytest.mark.parametrize("backend", ["onnxruntime", "ncnn"])
def test_training_rounds_as_the_backend_behind_the_board_does(backend: str) -> None:
    remote = PluginRef(name="remote", options={"host": "board", "backend": backend})
    assert scheme_of(remote, Quantize()) == backend_named(backend).scheme


def test_a_board_that_is_not_there_ends_the_run_with_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, {"host": "127.0.0.1", "port": 1})
    assert done.returncode == 2
    assert "nothing answers ssh at 127.0.0.1 port 1: start sshd there" in " ".join(
        done.stderr.split()
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
