"""Fills the templates of a kind and puts the folder in its place in one step."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from slimkit.errors import SlimkitError
from slimkit.scaffold.naming import Names


def write_package(names: Names, parent: Path) -> Path:
    """Write the package of a new plugin into a folder of its own below `parent`.

    Returns:
        The folder.

    Raises:
        SlimkitError: there is something of that name already; nothing was written.
    """
    folder = parent / names.package
    if folder.exists() or folder.is_symlink():
        raise SlimkitError(f"{folder} exists already: choose another name, or --output")
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{names.package}-", dir=parent))
    try:
        for path, text in filled(names).items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(text, encoding="utf-8")
        work.chmod(0o755)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def filled(names: Names) -> dict[str, str]:
    """Every file of the package: its path below the folder, and its text."""
    minor = ".".join(version("slimkit").split(".")[:2])
    values = {
        "kind": names.kind,
        "name": names.plugin,
        "package": names.package,
        "module": names.module,
        "cls": names.cls,
        "slimkit": minor,
    }
    templates = files("slimkit.scaffold") / "templates"
    sources = {**_below(templates / "package"), **_below(templates / names.kind)}
    return {
        Template(path).substitute(values): Template(text).substitute(values)
        for path, text in sources.items()
    }


def _below(folder: Traversable, prefix: str = "") -> dict[str, str]:
    """Path without its last suffix, ``.txt``, and text, of every file in `folder`."""
    found: dict[str, str] = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found |= _below(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".txt"):
            found[prefix + entry.name.removesuffix(".txt")] = entry.read_text(encoding="utf-8")
    return found
