"""Writes a folder so that a crash never leaves half of one and never loses the last good one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimkit.errors import ArtifactError, in_one_line

MANIFEST = "slimkit.json"
FORMAT = 1  # of artifacts; raised when an older slimkit could not read the new ones


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `directory` if the block succeeds.

    Raises:
        ArtifactError: `directory` holds something that slimkit did not write.
    """
    check_target(directory)
    directory = behind(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield work
        work.chmod(0o755)
        move(work, directory)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def move(source: Path, target: Path) -> None:
    """Put a finished folder in place of an older one, which comes back if that fails.

    Raises:
        ArtifactError: `target` holds something that slimkit did not write.
    """
    check_target(target)
    old = source.with_name(f"{source.name}-old")
    if target.exists():
        target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def behind(directory: Path) -> Path:
    """Where a link leads, so that the folder there is replaced and the link stays."""
    return directory.resolve() if directory.is_symlink() else directory


def check_target(directory: Path) -> None:
    """Refuse to replace what slimkit did not write, and the folder that the process is in."""
    whole = directory.resolve()
    if not whole.name or whole == Path.cwd():
        raise ArtifactError(
            f"{str(directory) or 'an empty name'} is no folder that slimkit could put in place of "
            "another: name one, such as runs/small"
        )
    if directory.is_dir():
        if any(directory.iterdir()) and not (directory / MANIFEST).is_file():
            raise ArtifactError(
                f"{directory} is not empty and holds no {MANIFEST}, so slimkit will not replace "
                "it; choose another folder or remove it yourself"
            )
    elif directory.exists():
        raise ArtifactError(f"{directory} is a file; choose another folder")


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write ``slimkit.json`` with `content` and the hash of every other file."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    hashes = {str(path.relative_to(directory)): sha256(path) for path in files}
    text = json.dumps({**content, "files": hashes}, indent=1, allow_nan=False)
    path = directory / MANIFEST
    path.write_text(text + "\n", encoding="utf-8")
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def understood(directory: Path) -> Iterator[None]:
    """Inside, what a manifest holds is used: what is missing there, or is of another kind, is told.

    Raises:
        ArtifactError: instead of what Python says of it.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(
            f"{directory / MANIFEST} does not hold what this slimkit writes "
            f"({in_one_line(error)}): it was edited, or is of another version; export again"
        ) from error


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of ``slimkit.json``, once every file's hash was found right.

    Raises:
        ArtifactError: no artifact, another format, or a file is missing or was changed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory} is no slimkit artifact: it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, files = content["format"], dict(content["files"])
        if not files:
            raise ValueError("it names no file")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); export the model again") from error
    if version != FORMAT:
        raise ArtifactError(f"{path} has format {version!r}; this slimkit reads format {FORMAT}")
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; export the model again")
        if sha256(file) != expected:
            raise ArtifactError(
                f"{file} was changed after the export (its SHA-256 is not the one in {MANIFEST}); "
                "export the model again"
            )
    return content
