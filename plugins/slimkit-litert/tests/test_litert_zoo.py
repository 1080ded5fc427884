"""Architectures of torchvision and timm compile in float and int8 and agree; ten of the zoo."""

from pathlib import Path

import pytest
from architectures import row

pytest.importorskip("slimkit_litert", reason="`make test-slow` installs it in .venv-litert")
pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install ai-edge-litert")

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


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("library", "name", "side"), SAMPLE)
def test_architecture_compiles_and_agrees(library, name, side):
    found = row(Path(__file__).with_name("litert_zoo.py"), library, name, str(side))
    assert found["float"]["sqnr_db"] >= 60
    # attention computes in float, whose last bits send values to other integers
    attends = "BATCH_MATMUL" in found["int8"]["operators"]
    assert found["int8"]["sqnr_db"] >= (20 if attends else 35)
    assert found["int8"]["layers_in_float"] == 0
    assert found["int8"]["bytes"] < 0.45 * found["float"]["bytes"]
