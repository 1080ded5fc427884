"""Evaluation mode, or running without compiling, for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode; each module's own flag comes back afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Inside, what torch.compile made of `model` or its parts runs as it was written."""
    if all(getattr(m, "_compiled_call_impl", None) is None for m in model.modules()) and not any(
        type(m).__name__ == "OptimizedModule" for m in model.modules()
    ):
        yield  # torch.compile takes seconds to import
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile")  # beside slimkit's hooks
        yield
