"""Evaluation mode, another forward, no compiling, or not running at all, for a while."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from slimkit.errors import SlimkitError


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
def replaced(network: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `network` computes `forward`, also where its own forward is called by name."""
    own = vars(network).get("forward")
    network.forward = forward
    try:
        yield
    finally:
        if own is None:
            del network.forward
        else:
            network.forward = own


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Inside, nn.MultiheadAttention calls the operations that it is made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, no module of `model` may run: slimkit works on copies.

    Raises:
        SlimkitError: one does, since a copy's forward reaches it.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def refuse(module: nn.Module, _args: object) -> None:
        if id(module) in names:
            name = names[id(module)] or type(model).__name__
            raise SlimkitError(
                f"a copy of {type(model).__name__} runs the original's {name}: a lambda, a hook or "
                "another closure holds it. Let the forward take it from self"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
