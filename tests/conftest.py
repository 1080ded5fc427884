"""Every test starts from the same random numbers, and small networks do not wait for threads."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import invalidate_caches
from pathlib import Path

import pytest
from quickly import (  # noqa: F401  (fixtures)
    _no_measuring_process,
    _one_table_of_operators,
    _seed,
    _short_timing,
    measuring_memory,
)

# what is imported there fails on purpose; there is a second one beside the packages
collect_ignore = ["broken_plugins", "conftest.py"]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it


@dataclass
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Runs a command line in a folder, without the seconds that a process takes to import torch."""
    from slimkit.cli.main import main

    def run(folder: Path, *args: str) -> Done:
        before = set(sys.modules)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.syspath_prepend(folder)
            patch.setattr(sys, "argv", ["slimkit", *map(str, args)])
            capsys.readouterr()
            with pytest.raises(SystemExit) as exit:
                main()
        said = capsys.readouterr()
        for name in set(sys.modules) - before:  # the folder's own, which may change
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        return Done(exit.value.code or 0, said.out, said.err)

    return run


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Puts a package with dist-info, entry point and modules on the path, as pip would."""
    from slimkit import registry

    before = set(sys.modules)
    monkeypatch.delenv("SLIMKIT_PLUGINS", raising=False)  # `make test-alone` sets it
    monkeypatch.syspath_prepend(tmp_path)

    def install(
        package: str,
        modules: Mapping[str, str],
        entry_points: str | None = None,
        package_version: str = "1.0",
    ) -> Path:
        info = tmp_path / f"{package.replace('-', '_')}-{package_version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {package_version}\n"
        (info / "METADATA").write_text(metadata)
        if entry_points is None:
            entry_points = f"[slimkit]\n{package.removeprefix('slimkit-')} = {next(iter(modules))}"
        (info / "entry_points.txt").write_text(entry_points)
        for name, text in modules.items():
            path = tmp_path / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        invalidate_caches()
        registry.discover.cache_clear()
        return tmp_path

    registry.discover.cache_clear()
    yield install
    registry.discover.cache_clear()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
