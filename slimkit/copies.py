"""Copies a module whole, whatever it keeps in its attributes."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """A deep copy. Tensors that a module keeps with their graph (losses of a step) are detached.

    >>> net = nn.Linear(2, 1)
    >>> net.last = net.weight.sum()  # copy.deepcopy refuses this one
    >>> copied(net).last.requires_grad
    False
    """
    memo: dict[int, Tensor] = {}
    for part in module.modules():
        kept = {k: v for k, v in vars(part).items() if k not in ("_parameters", "_modules")}
        for leaf in tree_leaves(kept):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(module, memo)
