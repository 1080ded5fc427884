"""A disk that fills up during an export: an error that says so, and nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
import torch
from torch import nn
import slimkit

net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 512, 3)).eval()
x = torch.randn(1, 3, 12, 12)
small = slimkit.quantize(net, [x], sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    slimkit.export(small, x, sys.argv[1], directory=sys.argv[2])
except OSError as error:
    print("OSError:", error.strerror)
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "ncnn"])
def test_a_full_disk_is_an_error_of_the_system(backend: str, tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, str(target)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1:] == ["OSError: File too large"], done.stderr
    assert list(tmp_path.iterdir()) == []
