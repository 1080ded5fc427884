"""The folder of an unfinished run: whose it is, and what a later run finds in it."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from slimkit.deploy.folder import check_target
from slimkit.errors import SlimkitError
from slimkit.pruning.prune import channel_multiple
from slimkit.recipe import Recipe
from slimkit.training.deployment import aside, rejected

Say = Callable[[str], None]
LAST, BEGUN = "last.ckpt", "pretrain.ckpt"
"""Checkpoints of both trainings."""
DENSE = "dense.safetensors"
"""Weights after the pretraining, for a resumed run."""
_TRAINED = (LAST, BEGUN, DENSE)
_KEY, _MODEL, _LOCK = "recipe.sha256", "model.json", "lock"
_PATIENCE_S = 10.0  # workers of a run that was killed hold its lock for a moment


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold `work`, which is made where it is missing, against other runs; freed by any end.

    Raises:
        SlimkitError: another run is at work in it.
    """
    lock, until = FileLock(work / _LOCK), time.monotonic() + _PATIENCE_S
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=max(0.0, until - time.monotonic()))
            break
        except FileNotFoundError:  # the other run has just ended, and taken the folder away
            continue
        except Timeout as error:
            raise SlimkitError(
                f"another run is at work in {work}: wait for its end, or choose another --output"
            ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            (work / _LOCK).unlink(missing_ok=True)  # whoever has opened it by now tries again
            work.rmdir()  # where nothing was begun
        lock.release()


def leave(work: Path) -> None:
    """Remove what only an unfinished run needs; logs stay."""
    for leftover in (*_TRAINED, _KEY, _MODEL):
        (work / leftover).unlink(missing_ok=True)


def prepare(recipe: Recipe, output: Path, work: Path, fresh: bool, say: Say) -> None:
    """Set aside in `work`, which is held, what does not belong to this run.

    Raises:
        SlimkitError: there is something at a folder's place that is not slimkit's.
    """
    for folder in (output, rejected(output)):
        check_target(folder)
    _sweep(output)
    key, multiple, note = _key(recipe), _multiple(recipe), work / _KEY
    if fresh:
        _empty(work)
    else:
        before, _, rounded = (note.read_text() if note.is_file() else "").partition(" ")
        # channels that suit one backend more may suit those that are left as well
        rounded = rounded or "1"  # as it was before this was noted
        if before != key or not rounded.isdecimal() or int(rounded) % multiple:
            _set_aside(work, say)
    note.write_text(f"{key} {multiple}")


def _key(recipe: Recipe) -> str:
    """A hash of what training depends on: gates, say, may change while a run is unfinished."""
    left = {"gates", "output", "export", "metric", "quantize"}
    prune, quantize = recipe.prune, recipe.quantize
    if prune is not None and prune.ratios == "sensitivity":
        left.remove("metric")
    if quantize is not None and quantize.train_from is not None:
        left.remove("quantize")
    about = recipe.model_dump(mode="json", exclude=left)
    if "quantize" in about:  # trained with the arithmetic of the first
        about["first backend"] = recipe.export[0].model_dump(mode="json")
    if recipe.weights is not None and recipe.weights.is_file():
        with recipe.weights.open("rb") as file:
            about["weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _multiple(recipe: Recipe) -> int:
    """What the backends round channels to, where the recipe leaves that to them."""
    prune = recipe.prune
    if prune is None or prune.granularity != "channel" or prune.round_to is not None:
        return 1
    return channel_multiple(backend.name for backend in recipe.export)


def _set_aside(work: Path, say: Say) -> None:
    """Keep what another recipe has trained."""
    if not any((work / name).exists() for name in _TRAINED):
        _empty(work)
        return
    old = work.with_name(f"{work.name}.old")
    if (old / _KEY).exists():  # goes last, so that a move that was killed goes on
        shutil.rmtree(old)
    old.mkdir(exist_ok=True)
    for entry in sorted(_entries(work), key=lambda entry: entry.name == _KEY):
        shutil.move(entry, old / entry.name)
    say(
        f"starting over: the unfinished run in {work} was of a recipe that trains otherwise; what "
        f"it had trained is kept in {old}"
    )


def _empty(work: Path) -> None:
    for entry in _entries(work):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _entries(work: Path) -> list[Path]:
    return [entry for entry in work.iterdir() if entry.name != _LOCK]


def _sweep(output: Path) -> None:
    """Remove what an export that was killed has left beside the artifact."""
    begin = f".{aside(output).name}-"
    for left in output.parent.glob(f"{glob.escape(begin)}*"):
        if re.fullmatch(r"[a-z0-9_]{8}(-old)?", left.name.removeprefix(begin)):
            shutil.rmtree(left, ignore_errors=True)


def compare_models(model: nn.Module, work: Path) -> None:
    """Refuse to go on with a model of other shapes than the one that training began with."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    note = work / _MODEL
    if note.is_file() and any((work / name).exists() for name in _TRAINED):
        before = json.loads(note.read_text())
        for name in sorted(before.keys() | shapes.keys()):
            if before.get(name) != shapes.get(name):
                raise SlimkitError(
                    f"the model has changed since the training in {work} began: {name} was "
                    f"{before.get(name, 'not there')} and is {shapes.get(name, 'not there')}; "
                    "start over with --fresh, or bring that model back"
                )
    note.write_text(json.dumps(shapes))
