"""Exact rewrites keep the outputs of ten families of timm, which were not written for slimkit."""

import pytest
from architectures import ZOO, row

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
    rows = row(ZOO / "rewritten_one.py", "timm", name)["rewrites"]
    assert {known for known, one in rows.items() if "places" in one} >= FOUND[name], rows
    for one in rows.values():
        if one.get("exact"):
            assert one["off"] < 1e-3, rows
        elif "places" not in one:
            assert "found nothing to do" in one["refused"], rows
