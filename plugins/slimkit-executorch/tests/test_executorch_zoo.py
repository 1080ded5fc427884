"""Ten architectures as random weights make them: float and int8 files that agree, or a reason."""

import pytest
from architectures import ZOO, row

pytest.importorskip("executorch", reason="needs executorch: `make test-slow` has an environment")
pytest.importorskip("slimkit_executorch")

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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("library", "name"), ARCHITECTURES)
def test_architecture_is_compiled_and_agrees(library, name):
    script = ZOO / "quantized_one.py"
    found = row(script, library, name, "executorch", "--threads", "1")["executorch"]
    assert "failure" not in found, found
    assert found["integers"] > 0
    assert found["finite"]
    assert found["alive"]
    assert found["decibels"] >= LEAST_DB
