"""Architectures of torchvision and timm compile in float and int8 and agree; ten of the zoo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("slimkit_litert", reason="`make test-slow` installs it in .venv-litert")
pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install ai-edge-litert")

REPOSITORY = Path(__file__).parents[3]
PLACES = [
    REPOSITORY / ".venv-test" / "zoo",  # where `make test` puts torchvision and timm
    REPOSITORY.parent / "shared" / "tools",  # torchvision beside a CPU build of torch
]

SAMPLE = [
    ("torchvision", "resnet18", 96),
    ("torchvision", "squeezenet1_1", 96),
    ("torchvision", "mobilenet_v3_small", 96),
    ("torchvision", "shufflenet_v2_x0_5", 96),
    ("torchvision", "regnet_x_400mf", 96),
    ("timm", "efficientnet_b0", 96),
    ("timm", "ghostnet_100", 96),
    ("timm", "convnext_atto", 96),
    ("timm", "deit_tiny_patch16_224", 224),
    ("timm", "densenet121", 96),
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("library", "name", "side"), SAMPLE)
def test_architecture_compiles_and_agrees(environment, library, name, side):
    program = Path(__file__).with_name("litert_zoo.py")
    done = subprocess.run(
        [sys.executable, str(program), library, name, str(side)],
        env=environment,
        capture_output=True,
        text=True,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["float"]["sqnr_db"] >= 60
    # attention computes in float, whose last bits send values to other integers
    attends = "BATCH_MATMUL" in row["int8"]["operators"]
    assert row["int8"]["sqnr_db"] >= (20 if attends else 35)
    assert row["int8"]["layers_in_float"] == 0
    assert row["int8"]["bytes"] < 0.45 * row["float"]["bytes"]
