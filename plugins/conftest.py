"""The packages' tests run as slimkit's own do."""

import os

collect_ignore = ["conftest.py"]  # which tests/ has as well
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it

from quickly import (  # noqa: E402, F401  (fixtures)
    _no_measuring_process,
    _one_table_of_operators,
    _seed,
    _short_timing,
    measuring_memory,
)
