"""Copies a module whole, whatever it keeps in its attributes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)


def copied(module: M, *, share: bool = False) -> M:
    """A deep copy. Tensors that a module keeps with their graph (losses of a step) are detached.

    What torch.compile made of the module or its parts is plain in the copy: slimkit changes
    structure and operations, and compiled code would not follow.

    Args:
        module: what to copy.
        share: let the copy's parameters be new objects around the same numbers, which costs no
            memory; then they may be replaced (``parameter.data = ...``), but not written into.

    >>> net = nn.Linear(2, 1)
    >>> net.last = net.weight.sum()  # copy.deepcopy refuses this one
    >>> copied(net).last.requires_grad
    False
    """
    memo: dict[int, Any] = {}
    if share:
        for parameter in module.parameters():
            if type(parameter) is nn.Parameter:  # a subclass holds more than its numbers
                flag = parameter.requires_grad
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=flag)
        for buffer in module.buffers():
            if type(buffer) is Tensor:
                memo[id(buffer)] = buffer.detach().clone()
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_modules") and not _is_plain(value):
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                        memo[id(leaf)] = leaf.detach().clone()
    return _copied(module, memo)


_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.Size})
"""Types whose values nobody can change."""


def _is_plain(value: object) -> bool:
    """Whether it holds nothing that would have to be copied."""
    return type(value) in _PLAIN or (type(value) in (dict, OrderedDict) and not value)


def _is_usual(part: nn.Module) -> bool:
    """Whether it is copied as nn.Module has it, by what its attributes hold."""
    kind = type(part)
    return not (hasattr(kind, "__deepcopy__") or is_compiled(part)) and all(
        getattr(kind, method) is getattr(nn.Module, method)
        for method in ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    )


def _copied(module: M, memo: dict[int, Any]) -> M:
    """What copy.deepcopy gives, several times faster where modules are as nn.Module makes them."""
    twins: dict[nn.Module, nn.Module] = {}
    for part in module.modules():
        if _is_usual(part):
            twins[part] = memo[id(part)] = type(part).__new__(type(part))
    for part in module.modules():
        if is_compiled(part):
            memo[id(part)] = copy.deepcopy(part._orig_mod, memo)
    for part, twin in twins.items():
        for name, value in part.__getstate__().items():
            if not _is_plain(value):
                vars(twin)[name] = copy.deepcopy(value, memo)
            elif isinstance(value, dict):  # which several modules may share
                vars(twin)[name] = memo.setdefault(id(value), type(value)())
            else:
                vars(twin)[name] = value
    return copy.deepcopy(module, memo)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile wrapped it; `nn.Module.compile` leaves the module as it is."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def compiled_parts(module: nn.Module) -> list[str]:
    """What torch.compile made of a module: the paths, or the name of the class for all of it."""
    names = (
        name or type(getattr(module, "_orig_mod", module)).__name__
        for name, part in module.named_modules()
        if is_compiled(part) or vars(part).get("_compiled_call_impl") is not None
    )
    return list(names)


def uncompiled_(module: nn.Module) -> nn.Module:
    """The module with plain parts in the places of those that torch.compile wrapped."""
    if is_compiled(module):
        whole: Any = module._orig_mod
        return uncompiled_(whole)
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if is_compiled(child):
                setattr(part, name, child._orig_mod)
        vars(part).pop("_compiled_call_impl", None)  # set by nn.Module.compile
    return module
