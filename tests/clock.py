"""Times commands, also on a machine where others compute."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable


def allowed(seconds: float) -> float:
    """`seconds` where what a command line imports takes 0.12 of them; in proportion elsewhere."""
    needed = [sys.executable, "-c", "import click, importlib.metadata, rich.table"]
    return seconds * max(1.0, fastest(lambda: subprocess.run(needed, check=True)) / 0.12)


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the processes that `run` starts, the best of seven.

    Waiting is counted up to 50 ms: more of it is the machine at work elsewhere.
    """
    found = []
    for _ in range(7):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        found.append(min(wall, busy + 0.05))
    return min(found)
