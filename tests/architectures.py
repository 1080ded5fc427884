"""Runs a script on a real architecture, in a process that finds torchvision and timm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "benchmarks" / "zoo"
PLACES = [
    Path(sys.prefix) / "zoo",  # where `make test` puts torchvision and timm
    Path(sys.prefix).parent / ".venv-test" / "zoo",  # the same, from an environment beside it
    ROOT.parent / "shared" / "tools",  # torchvision beside a CPU build of torch
    ROOT,
]
IMPORTS = """
import contextlib
with contextlib.suppress(ImportError):
    import torchvision_ops
import torchvision, timm
"""


def row(script: Path, library: str, name: str, *arguments: str) -> dict[str, Any]:
    """What `script` finds out about an architecture: the JSON that its last line is."""
    if not _importable():
        pytest.skip("torchvision and timm do not import here")
    done = _python(str(script), library, name, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@cache
def _importable() -> bool:
    return _python("-c", IMPORTS).returncode == 0


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, PLACES), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True)
