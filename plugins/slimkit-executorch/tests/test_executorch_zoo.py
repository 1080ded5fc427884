"""Ten architectures as random weights make them: float and int8 files that agree, or a reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("executorch", reason="needs executorch: `make test-slow` has an environment")
pytest.importorskip("slimkit_executorch")

ROOT = Path(__file__).parents[3]
PLACES = [
    Path(sys.prefix).parent / ".venv-test" / "zoo",  # where `make` puts torchvision and timm
    ROOT.parent / "shared" / "tools",  # torchvision beside a CPU build of torch
    ROOT,
]
ARCHITECTURES = [
    ("torchvision", "resnet18"),
    ("torchvision", "mobilenet_v2"),
    ("torchvision", "mobilenet_v3_small"),
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "squeezenet1_1"),
    ("torchvision", "efficientnet_b0"),
    ("torchvision", "densenet121"),
    ("timm", "ghostnet_100"),
    ("timm", "deit_tiny_patch16_224"),
    ("timm", "regnety_002"),
]
LEAST_DB = 20.0  # of the file against the simulation, whose weights are random


@pytest.fixture(scope="session")
def environment():
    """Variables with which torchvision imports."""
    path = os.pathsep.join([*map(str, PLACES), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path}
    code = "import contextlib\nwith contextlib.suppress(ImportError):\n  import torchvision_ops\n"
    code += "import torchvision, timm"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True)
    if done.returncode:
        pytest.skip("torchvision and timm do not import here")
    return variables


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("library", "name"), ARCHITECTURES)
def test_architecture_is_compiled_and_agrees(environment, library, name):
    script = ROOT / "benchmarks" / "zoo" / "quantized_one.py"
    command = [sys.executable, script, library, name, "executorch", "--threads", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    row = json.loads(done.stdout.splitlines()[-1])["executorch"]
    assert "failure" not in row, row
    assert row["integers"] > 0
    assert row["finite"]
    assert row["alive"]
    assert row["decibels"] >= LEAST_DB
