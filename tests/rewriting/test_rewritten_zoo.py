"""Exact rewrites keep the outputs of ten families of timm, which were not written for slimkit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "zoo" / "rewritten_one.py"
PLACES = [Path(sys.prefix) / "zoo", Path(__file__).parents[3] / "shared" / "tools"]
FOUND = {
    "tresnet_m": {"focus-to-conv", "remove-noops", "sigmoid-to-hardsigmoid"},
    "efficientnet_b0": {"silu-to-hardswish", "sigmoid-to-hardsigmoid", "pad-channels"},
    "deit_tiny_patch16_224": {"gelu-to-tanh", "remove-noops"},
    "mobilenetv3_large_100": {"fixed-pooling"},
    "ghostnet_100": {"remove-noops", "fixed-pooling", "pad-channels"},
    "regnety_002": {"sigmoid-to-hardsigmoid", "fixed-pooling", "pad-channels"},
    "convnext_atto": {"gelu-to-tanh", "remove-noops", "fixed-pooling"},
    "mobilevit_xxs": {"silu-to-hardswish", "remove-noops", "fixed-pooling"},
    "cspresnext50": {"remove-noops", "fixed-pooling", "pad-channels"},
    "levit_128s": {"remove-noops"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_exact_rewrites_keep_the_outputs_of_a_family(name):
    path = os.pathsep.join([*map(str, PLACES), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(SCRIPT), "timm", name]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if "import timm\n" in done.stderr:  # the line of the traceback that failed
        pytest.skip("timm does not import here")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rewrites"]
    assert {name for name, row in rows.items() if "places" in row} >= FOUND[name], rows
    for row in rows.values():
        if row.get("exact"):
            assert row["off"] < 1e-3, rows
        elif "places" not in row:
            assert "found nothing to do" in row["refused"], rows
