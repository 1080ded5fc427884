"""Adds distillation losses to a training step that calls its optimizers itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from slimkit.errors import SlimkitError
from slimkit.training.catching import Catch


@contextmanager
def adding(
    inner: pl.LightningModule, caught: Catch, taught: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Inside a training step, the first `manual_backward` that learns the student learns more.

    That is the first one after the student's forward, of a loss that hangs on what the student
    gave, while its parameters learn (`toggle_optimizer` lets others rest).

    Args:
        inner: whose step it is.
        caught: of the student's forward.
        taught: gives the loss with the distillation losses added.

    Raises:
        SlimkitError: the step goes round `manual_backward`, so that nothing could be added.
    """
    called, added = False, False
    own = inner.manual_backward

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal called, added
        called = True
        if caught.called and caught.learns and not added and caught.is_behind(loss):
            added = True
            loss = taught(loss)
        own(loss, *args, **kwargs)

    inner.manual_backward = manual_backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del inner.manual_backward
    if not called and caught.called and caught.learns:
        raise SlimkitError(
            f"{type(inner).__name__} calls no self.manual_backward in its training_step, so "
            "distillation losses cannot be added: call it instead of loss.backward(), or write "
            "distill: false"
        )
