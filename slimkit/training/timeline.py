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
        module = trainer.lightning_module
        if module is not None and not module.automatic_optimization:
            raise SlimkitError(
                "max_steps counts every step that the module's own optimization takes, which tells "
                "no number of batches: leave it out and set max_epochs, and limit_train_batches "
                "where the data has no length"
            )
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


def moment(trainer: pl.Trainer, when: float | int) -> float:
    """A moment of a recipe as a fraction of the run.

    Args:
        trainer: knows its batches, so training has begun.
        when: a fraction from 0 to 1, or a whole number of optimizer steps above 1. The first batch
            behind that many steps is meant, also where gradients are accumulated over batches.

    Raises:
        SlimkitError: the run has no known length, or ends before.
    """
    total = total_batches(trainer)
    if when <= 1:
        return float(when)
    accumulated, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if math.isinf(batches):
        done: float = when * accumulated
    else:  # the last step of an epoch comes with its last batch
        epochs, steps = divmod(when, math.ceil(batches / accumulated))
        done = epochs * batches + steps * accumulated
    if done > total:
        raise SlimkitError(
            f"ends at step {when}, but the training has only {math.ceil(total / accumulated)}: "
            "train longer, or write fewer steps, or a fraction such as 0.4"
        )
    return done / total


def progress(trainer: pl.Trainer, batch_idx: int) -> float:
    """Fraction of the run that lies behind when batch `batch_idx` of this epoch starts."""
    if math.isinf(trainer.num_training_batches):
        loop = trainer.fit_loop.epoch_loop
        done = loop.total_batch_idx - loop.batch_idx + batch_idx
    else:
        done = int(trainer.current_epoch * trainer.num_training_batches) + batch_idx
    return float(min(1.0, done / total_batches(trainer)))
