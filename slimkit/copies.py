"""Copies a module whole, whatever it keeps in its attributes."""

from __future__ import annotations

import copy
from typing import TypeVar

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
    memo: dict[int, Tensor] = {}
    if share:
        for parameter in module.parameters():
            if type(parameter) is nn.Parameter:  # a subclass holds more than its numbers
                flag = parameter.requires_grad
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=flag)
    for part in module.modules():
        kept = {k: v for k, v in vars(part).items() if k not in ("_parameters", "_modules")}
        for leaf in tree_leaves(kept):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(module, memo)
