"""Real architectures lose half of their multiply-accumulates and go on working; ten of the zoo.

Four of them take a minute together, the others belong to the slow tests. All 56 run with
``python benchmarks/zoo/run.py``.
"""

import pytest
from architectures import ZOO, row

SAMPLE = [
    ("torchvision", "mobilenet_v3_large"),
    ("torchvision", "shufflenet_v2_x1_0"),
    ("torchvision", "swin_t"),
    ("timm", "levit_128s"),
]
SLOW = [
    ("timm", "deit_tiny_patch16_224"),
    ("torchvision", "densenet121"),
    ("torchvision", "googlenet"),  # heads for the training only
    ("torchvision", "lraspp_mobilenet_v3_large"),
    ("timm", "cspdarknet53"),
    ("timm", "ghostnet_100"),
]


@pytest.mark.parametrize(
    ("library", "name"), [*SAMPLE, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_architecture_is_pruned_to_half_and_goes_on_working(library, name):
    found = row(ZOO / "one.py", library, name, "--threads", "1")
    assert "failure" not in found, found
    assert 0.45 <= found["macs"] <= 0.51
    assert found["alive"]
    assert found["shapes"]
    assert found["finite"]
    assert found["backward"]
    assert found["exports"]
    assert found.get("error", 0.0) < 1e-3  # against the original with zeroed channels
