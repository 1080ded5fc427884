"""Work that checks have done in a fresh process, which this file is, too, as a program."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

LIMIT_S = 300


def in_fresh_process(task: str, folder: Path, **environment: str) -> dict[str, Any]:
    """What a task of this file prints as JSON; it reads its material from `folder`.

    Raises:
        RuntimeError: the process failed; the text holds the end of what it said.
    """
    path = os.pathsep.join(part for part in sys.path if part)
    done = subprocess.run(
        [sys.executable, "-m", "slimkit.testing.worker", task, str(folder)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise RuntimeError(f"a fresh process failed with exit code {done.returncode}\n{last}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def listing(_folder: Path) -> dict[str, Any]:
    """Import what SLIMKIT_PLUGINS allows and run its hooks: heavy modules, and milliseconds.

    Where it allows nothing, what ships in the box.
    """
    from importlib.metadata import entry_points

    from slimkit.registry import BUILTIN, GROUP, records_of

    sources: list[Callable[[], Any]] = [lambda: import_module(BUILTIN)]
    allowed = os.environ["SLIMKIT_PLUGINS"].split(",")
    points = [point.load for point in entry_points(group=GROUP) if point.name in allowed]
    start = time.perf_counter()
    for load in points or sources:
        with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
            records_of(load())  # another promise is about what fails
    ms = 1000 * (time.perf_counter() - start)
    heavy = [name for name in ("torch", "pytorch_lightning") if name in sys.modules]
    return {"heavy": heavy, "ms": ms}


def unpickling(folder: Path) -> dict[str, Any]:
    """Read every pickle, as a data loader's worker or another rank would."""
    failed = {}
    for path in sorted(folder.glob("*.pickle")):
        try:
            pickle.loads(path.read_bytes())
        except Exception as error:
            failed[path.stem] = f"{type(error).__name__}: {error}"
    return {"failed": failed}


def running(folder: Path) -> dict[str, Any]:
    """Run the files of a backend, without whatever the process that compiled them had in memory."""
    import torch

    plan = json.loads((folder / "plan.json").read_text())
    module, _, name = plan["target"].partition(":")
    __import__(module)
    backend = getattr(sys.modules[module], name)(**plan["options"])
    inputs = torch.load(folder / "inputs.pt")
    outputs = [out.clone() for out in backend.load(folder / "files")(*inputs)]
    torch.save(outputs, folder / "outputs.pt")
    return {"outputs": len(outputs)}


TASKS = {"listing": listing, "unpickling": unpickling, "running": running}

if __name__ == "__main__":
    print("\n" + json.dumps(TASKS[sys.argv[1]](Path(sys.argv[2]))))
