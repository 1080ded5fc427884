"""Puts a package on a path as an installer does, without one."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path


def installed(package: Path, site: Path) -> None:
    """Write the dist-info of the package in a folder into `site`; its sources stay where they are.

    Args:
        package: holds pyproject.toml.
        site: a folder of the path, made here.
    """
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"{name} = {module}" for name, module in project["entry-points"]["slimkit"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[slimkit]", *lines]) + "\n")
    (info / "INSTALLER").write_text("slimkit's tests\n")


def without_limit() -> dict[str, str]:
    """The environment of a process that sees every package, whatever `make test-alone` allows."""
    return {name: value for name, value in os.environ.items() if name != "SLIMKIT_PLUGINS"}
