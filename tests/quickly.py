"""What makes tests quick and repeatable, for those of slimkit and of the packages beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random numbers."""
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


@pytest.fixture(autouse=True, scope="session")
def _short_timing() -> Iterator[None]:
    """Files are timed for a tenth of a second, on one thread: no test is about how fast one is."""
    from slimkit.deploy import release

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(release.release.__kwdefaults__, "seconds", 0.1)
        patch.setattr(release, "usable_threads", lambda: 1)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_table_of_operators() -> Iterator[None]:
    """torch.onnx compiles its hundreds of operators anew for each export, for a second or two."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    tables: dict[int | None, dict[object, list[object]]] = {}
    make = ONNXRegistry.from_torchlib

    def once(*version: int, **options: int) -> ONNXRegistry:
        key = next(iter([*version, *options.values()]), None)
        if key not in tables:
            tables[key] = make(*version, **options).functions
        registry = ONNXRegistry()
        registry._opset_version = registry._opset_version if key is None else key
        registry.functions = {target: [*found] for target, found in tables[key].items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(once))
        yield
