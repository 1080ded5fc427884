"""Keeps what a fixed teacher gave on disk, for inputs that come again.

A file holds what a teacher gave for one batch, with a hash of each sample's bytes, so that samples
are found again in batches of another order. Whether a teacher gives a sample alone what it gives it
in a batch is tried once; where it does not, whole batches are found only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten

from slimkit.errors import SlimkitError
from slimkit.training.digest import digest

Given = dict[str, Tensor]
"""What a teacher gave, by place."""

_IN_MEMORY = 512 * 2**20  # bytes of files that are kept open as tensors


@dataclass(frozen=True)
class Key:
    """What a teacher was shown.

    Args:
        whole: a hash of everything.
        samples: of each sample; empty where the inputs have no common batch dimension.
    """

    whole: str
    samples: tuple[str, ...]


def key_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key:
    """The key of a forward's arguments, byte by byte."""
    leaves, structure = tree_flatten((args, dict(kwargs)))
    tensors = [leaf.detach().cpu().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
    rest = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    sizes = {len(t) if t.dim() else 0 for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        return Key(digest(f"{structure}{rest}{[(t.shape, t.dtype) for t in tensors]}", tensors), ())
    about = f"{structure}{rest}{[(t.shape[1:], t.dtype) for t in tensors]}".encode()
    rows = [t.reshape(len(t), -1).view(torch.uint8).numpy() for t in tensors]
    hashes = []
    for n in range(sizes.pop()):
        found = hashlib.sha256(about)
        for row in rows:
            found.update(row[n].data)
        hashes.append(found.hexdigest())
    return Key(hashlib.sha256("".join(hashes).encode()).hexdigest(), tuple(hashes))


class TeacherCache:
    """What one teacher gave, in a folder of its own.

    Args:
        folder: of the recipe; the teacher's own lies in it.
        identity: a hash of the teacher's weights, of the places and of its precision.
        say: told where an entry is damaged, with one line.

    Raises:
        SlimkitError: the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: str, say: Callable[[str], None]) -> None:
        self.folder = folder / identity[:16]
        self.say = say
        self.found = self.missed = 0  # batches
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SlimkitError(
                f"distill.cache: {self.folder} cannot be made: {error.strerror}"
            ) from error
        self._rows: dict[str, tuple[str, int]] = {}  # sample -> file and row
        self._files: set[str] = set()
        self._sound: set[str] = set()  # files whose bytes were compared with their hash
        self._open: dict[str, Given] = {}
        self._bytes = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            self._register(path)

    @property
    def is_useless(self) -> bool:
        """Whether nothing was ever found."""
        return self.missed > 0 and not self.found

    def find(self, key: Key) -> Given | None:
        """What was given for the same bytes, in whatever batches; None if anything is missing."""
        given = self._find(key)
        self.found += given is not None
        self.missed += given is None
        return given

    def keep(self, key: Key, given: Given, apart: bool) -> None:
        """Write down what was given, all of it or nothing.

        Args:
            key: what the teacher was shown.
            given: by place.
            apart: whether rows may be found by their samples.

        Raises:
            SlimkitError: the file cannot be written.
        """
        path = self._path(key.whole)
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in given.items()}
        about = {
            "samples": json.dumps(key.samples if apart else ()),
            "sha256": digest("", [plain[name] for name in sorted(plain)]),
        }
        aside = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(plain, aside, about)
            aside.replace(path)
        except (OSError, SafetensorError) as error:  # a full disk is either
            aside.unlink(missing_ok=True)
            raise SlimkitError(f"distill.cache: {path} cannot be written: {error}") from error
        self._files.add(key.whole)
        self._sound.add(key.whole)
        if apart:
            self._rows |= {sample: (key.whole, n) for n, sample in enumerate(key.samples)}

    def _find(self, key: Key) -> Given | None:
        if key.whole in self._files:
            return self._load(key.whole)
        places = [self._rows.get(sample) for sample in key.samples]
        if not places or None in places:
            return None
        rows = []
        for place in places:
            row = self._row(*place) if place is not None else None
            if row is None:
                return None
            rows.append(row)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, name: str, n: int) -> Given | None:
        """One row of a file: from memory, or where memory is short, from the disk."""
        if name not in self._open and name in self._sound:
            try:
                with safe_open(self._path(name), "pt") as file:
                    return {place: file.get_slice(place)[n] for place in file.keys()}  # noqa: SIM118  # no mapping
            except Exception as error:  # whatever became of the file since
                self._drop(name, error)
                return None
        given = self._load(name)
        return None if given is None else {place: t[n] for place, t in given.items()}

    def _load(self, name: str) -> Given | None:
        """A whole file, compared with its hash when it is read first; None where it is damaged."""
        if name in self._open:
            return self._open[name]
        try:
            # Copies: a file that somebody shortens under its memory map ends the process.
            given = {place: t.clone() for place, t in load_file(self._path(name)).items()}
            if name not in self._sound:
                with safe_open(self._path(name), "pt") as file:
                    wanted = file.metadata()["sha256"]
                if digest("", [given[place] for place in sorted(given)]) != wanted:
                    raise ValueError("its hash is another")
                self._sound.add(name)
        except Exception as error:  # a file may be damaged in any way
            self._drop(name, error)
            return None
        self._remember(name, given)
        return given

    def _remember(self, name: str, given: Given) -> None:
        size = sum(t.nbytes for t in given.values())
        if self._bytes + size <= _IN_MEMORY:
            self._open[name] = given
            self._bytes += size

    def _drop(self, name: str, error: Exception) -> None:
        """Forget a damaged file, and say so."""
        first = (str(error).splitlines() or [type(error).__name__])[0]
        self.say(f"distill.cache: {self._path(name)} is damaged ({first}): it is made again")
        self._path(name).unlink(missing_ok=True)
        self._files.discard(name)
        self._sound.discard(name)
        self._bytes -= sum(t.nbytes for t in self._open.pop(name, {}).values())
        self._rows = {s: place for s, place in self._rows.items() if place[0] != name}

    def _register(self, path: Path) -> None:
        name = path.stem
        try:
            with safe_open(path, "pt") as file:
                samples = json.loads(file.metadata()["samples"])
        except Exception as error:  # a file may be damaged in any way
            self._drop(name, error)
            return
        self._files.add(name)
        self._rows |= {sample: (name, n) for n, sample in enumerate(samples)}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
