"""Adaptive pooling becomes pooling with a kernel and a stride, which every runtime has.

Kernel and stride follow from the shape that a forward meets, so the module stays right at other
shapes, while a file holds the numbers of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from slimkit.quantization.corrections.beside import run
from slimkit.rewriting.changes import Calls
from slimkit.rewriting.found import Found, owner, traced
from slimkit.rewriting.replacements import arguments, pooling, returns_indices


def fixed_pooling(model: nn.Module, inputs: tuple[Any, ...]) -> Found:
    """Adaptive average and maximum pooling over windows that are all alike is written as such.

    Args:
        model: not changed.
        inputs: the forward's arguments.
    """
    calls = [c for c in traced(model, inputs).calls if c.op.startswith("adaptive_")]
    left: dict[str, str] = {}
    fits: list[str] = []

    def meet(name: str, op: str) -> Callable[[Callable[..., Any], Any, Any], Any]:
        def one(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            x, size = arguments(args, kwargs)
            where = owner(name) or "the forward"
            if returns_indices(args, kwargs):
                left[where] = "it gives the places of the maxima"
            elif pooling(op, x, size) is None:
                shape = "x".join(map(str, x.shape[2:]))
                left[where] = f"its windows over {shape} for an output of {size} are not alike"
            else:
                fits.append(name)
            return func(*args, **kwargs)

        return one

    run(model, inputs, {call.name: meet(call.name, call.op) for call in calls}, whole=True)
    changes = []
    for path, count in Counter(map(owner, fits)).items():
        ops = dict.fromkeys(c.op for c in calls if c.name in fits and owner(c) == path)
        changes.append(Calls(path, dict.fromkeys(ops, "pooling with fixed windows"), count))
    return Found(changes, left)
