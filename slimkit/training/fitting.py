"""A training of the command line: its trainer, its checkpoint, and how it ended.

Lightning leaves the process where it is interrupted, and blames whoever called it for what is wrong
with the arguments that a recipe passes on; here both become errors that say so.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning_fabric
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Checkpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from slimkit.errors import SlimkitError, StoppedError, in_one_line
from slimkit.progress import is_quiet
from slimkit.recipe import Recipe
from slimkit.training.draws import Draws
from slimkit.training.evaluation import muted
from slimkit.training.finite import check_finite
from slimkit.training.ranks import several
from slimkit.training.strategies import refuse_copies

_LIGHTNING = tuple(str(Path(library.__path__[0])) for library in (pl, lightning_fabric))


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    recipe: Recipe,
    last: Path,
    epochs: int,
    callbacks: Sequence[pl.Callback],
) -> pl.Trainer:
    """Train for `epochs`, from the checkpoint `last` on if it is there; it is kept up to date.

    Args:
        module: trained in place.
        data: to train on.
        recipe: gives the trainer's arguments.
        last: file of the checkpoint; logs lie beside it.
        epochs: how many in all.
        callbacks: beside those that keep the checkpoint.

    Raises:
        SlimkitError: Lightning refuses the recipe's arguments, the checkpoint is damaged, the
            weights became NaN, or another process has ended.
        StoppedError: the process was asked to end.
        KeyboardInterrupt: somebody pressed Ctrl-C.
    """
    resumed = last if last.is_file() else None
    draws = Draws(recipe.trainer.seed, data, epochs_in(last) if resumed else 0)
    with muted(), _explained(last), _by_lightning():
        kept: list[pl.Callback] = [draws, Finite(), KeepLast(last)]
        trainer = _trainer(recipe, last.parent, epochs, [*kept, *callbacks])
        trainer.fit(module, datamodule=data, ckpt_path=None if resumed is None else str(resumed))
        draws.leave()
    return trainer


def refuse_arguments(recipe: Recipe, folder: Path) -> None:
    """Have Lightning look at the recipe's trainer arguments before anything takes time.

    Args:
        recipe: gives them.
        folder: where logs would lie; nothing is written.

    Raises:
        SlimkitError: Lightning refuses them.
    """
    with muted(), _explained(folder):
        _trainer(recipe, folder, recipe.trainer.max_epochs, [])


def epochs_in(checkpoint: Path) -> int:
    """How many epochs were done when it was written.

    Raises:
        SlimkitError: it is damaged.
    """
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=False)
        return int(found["epoch"]) + 1
    except MemoryError:
        raise
    except Exception as error:  # pickle and zip raise anything
        why = in_one_line(error).rstrip(".")
        raise SlimkitError(f"{checkpoint} is damaged ({why}): start over with --fresh") from error


def _trainer(
    recipe: Recipe, folder: Path, epochs: int, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "logger": CSVLogger(str(folder), name="logs"),
        "enable_progress_bar": not is_quiet(),
        "enable_model_summary": False,
        "log_every_n_steps": 10,
        **recipe.trainer.arguments,
        "enable_checkpointing": True,
        "max_epochs": epochs,
        "callbacks": [*callbacks],
    }
    if arguments["enable_progress_bar"]:
        bar = RichProgressBar(leave=False, console_kwargs={"stderr": True})
        arguments["callbacks"].append(bar)
    try:
        trainer = pl.Trainer(**arguments)
    except Exception as error:  # it raises whatever its parts raise
        told = " ".join(str(error).split())
        raise SlimkitError(f"trainer: Lightning refuses these arguments: {told}") from error
    refuse_copies(trainer, "a run")
    return trainer


@contextmanager
def _explained(last: Path) -> Iterator[None]:
    """Say what the end of a training means for whoever started it."""
    try:
        yield
    except MisconfigurationException as error:
        raise SlimkitError(f"Lightning: {error}") from error
    except SIGTERMException as error:
        raise StoppedError(f"stopped by SIGTERM: {_way_on(last)}") from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes one of the other
            raise KeyboardInterrupt from error
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        _refuse_without_others(error, last)
        _refuse_by_lightning(error)
        raise


@contextmanager
def _by_lightning() -> Iterator[None]:
    """Leave SIGTERM to Lightning, which ends a training between two batches, on all ranks."""
    before = signal.getsignal(signal.SIGTERM)
    ours = getattr(before, "__module__", None) == "slimkit.cli.main"
    ours = ours and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _way_on(last: Path) -> str:
    return f"the same command {f'goes on from {last}' if last.is_file() else 'begins again'}"


def _refuse_without_others(error: Exception, last: Path) -> None:
    """What is raised where another process can no longer be talked to."""
    signs = ("[gloo", "Connection", "NCCL")
    if isinstance(error, RuntimeError) and several() and any(sign in str(error) for sign in signs):
        raise SlimkitError(
            f"another process of this training ended or is out of reach ({in_one_line(error)}): "
            f"{_way_on(last)}"
        ) from error


def _refuse_by_lightning(error: Exception) -> None:
    """What is raised in Lightning's own code is about the arguments that a recipe gave it."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if where.startswith(tuple(name + os.sep for name in _LIGHTNING)):
        told = " ".join(str(error).split())
        raise SlimkitError(f"trainer: Lightning: {type(error).__name__}: {told}") from error


class Finite(pl.Callback):
    """Ends a training whose weights are numbers no longer, before a checkpoint keeps them."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look at every weight once an epoch."""
        check_finite(module, f"after epoch {trainer.current_epoch + 1}")


class KeepLast(Checkpoint):
    """Keeps a checkpoint of the last epoch; a crash while it is written leaves the one before.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Write beside the file, then put it in place."""
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # whole before it has its name, if the power fails
            partial.replace(self.path)
