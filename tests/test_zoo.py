"""Real architectures lose half of their multiply-accumulates and go on working; ten of the zoo.

All 56 run with ``python benchmarks/zoo/run.py``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ZOO = Path(__file__).parent.parent / "benchmarks" / "zoo"
PLACES = [
    Path(sys.prefix) / "zoo",  # where `make test` puts torchvision and timm
    Path(__file__).parents[2] / "shared" / "tools",  # torchvision beside a CPU build of torch
]

SAMPLE = [
    ("torchvision", "densenet121"),
    ("torchvision", "googlenet"),  # heads for the training only
    ("torchvision", "mobilenet_v3_large"),
    ("torchvision", "shufflenet_v2_x1_0"),
    ("torchvision", "swin_t"),
    ("torchvision", "lraspp_mobilenet_v3_large"),
    ("timm", "cspdarknet53"),
    ("timm", "deit_tiny_patch16_224"),
    ("timm", "ghostnet_100"),
    ("timm", "levit_128s"),
]


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


@pytest.mark.parametrize(("library", "name"), SAMPLE)
def test_architecture_is_pruned_to_half_and_goes_on_working(environment, library, name):
    done = subprocess.run(
        [sys.executable, str(ZOO / "one.py"), library, name, "--threads", "1"],
        env=environment,
        capture_output=True,
        text=True,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    assert "failure" not in row, row
    assert 0.45 <= row["macs"] <= 0.51
    assert row["alive"]
    assert row["shapes"]
    assert row["finite"]
    assert row["backward"]
    assert row["exports"]
    assert row.get("error", 0.0) < 1e-3  # against the original with zeroed channels
