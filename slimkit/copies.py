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


def _copied(module: M, memo: dict[int, Any]) -> M:
    """What copy.deepcopy gives, several times faster where modules are as nn.Module makes them."""
    twins: dict[nn.Module, nn.Module] = {}
    for part in module.modules():
        kind = type(part)
        if not hasattr(kind, "__deepcopy__") and all(
            getattr(kind, method) is getattr(nn.Module, method)
            for method in ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
        ):
            twins[part] = memo[id(part)] = kind.__new__(kind)
    for part, twin in twins.items():
        for name, value in part.__getstate__().items():
            if not _is_plain(value):
                vars(twin)[name] = copy.deepcopy(value, memo)
            elif isinstance(value, dict):  # which several modules may share
                vars(twin)[name] = memo.setdefault(id(value), type(value)())
            else:
                vars(twin)[name] = value
    return copy.deepcopy(module, memo)
