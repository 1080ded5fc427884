"""Every test starts from the same random numbers, and small networks do not wait for threads."""

import os
from collections.abc import Iterator, Mapping

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_measuring_process() -> Iterator[None]:
    """Peak memory is measured in a process that takes seconds: only with `measuring_memory`."""
    from slimkit.deploy import release
    from slimkit.deploy.memory import Peak

    def unmeasured(files: Mapping[str, object], _inputs: object) -> dict[str, Peak]:
        return dict.fromkeys(files, Peak(None, "not measured in tests"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, "peaks", unmeasured)
        yield


@pytest.fixture
def measuring_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside, `release` measures peak memory as it does for users."""
    from slimkit.deploy import memory, release

    monkeypatch.setattr(release, "peaks", memory.peaks)
