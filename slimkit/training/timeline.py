"""Where a training run stands between its begin (0) and its end (1)."""

from __future__ import annotations

import math

import pytorch_lightning as pl

from slimkit.errors import SlimkitError


def total_batches(trainer: pl.Trainer) -> int:
    """How many training batches the whole run has.

    Raises:
        SlimkitError: the run has no known length.
    """
    batches = trainer.num_training_batches
    epochs = trainer.max_epochs
    if trainer.max_steps is not None and trainer.max_steps > 0:
        by_steps = trainer.max_steps * trainer.accumulate_grad_batches
        if epochs is None or epochs < 0 or math.isinf(batches):
            return int(by_steps)
        return int(min(by_steps, epochs * batches))
    if epochs is None or epochs < 0 or math.isinf(batches):
        raise SlimkitError(
            "a recipe's timeline needs a training of known length: set max_epochs or max_steps, "
            "and limit_train_batches where the data has no length"
        )
    return max(1, int(epochs * batches))


def progress(trainer: pl.Trainer, batch_idx: int) -> float:
    """Fraction of the run that lies behind when batch `batch_idx` of this epoch starts."""
    done = trainer.current_epoch * trainer.num_training_batches + batch_idx
    return float(min(1.0, done / total_batches(trainer)))
