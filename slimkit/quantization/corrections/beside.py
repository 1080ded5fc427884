"""Runs a simulation beside its float reference and meets its layers on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slimkit.calls import Call, CallMode, Trace
from slimkit.evaluating import evaluating
from slimkit.quantization.fake import FakeQuantization

LIVE = 2**25
"""Values that the largest tensor of a forward may have: 128 MB."""

HELD = 2**26
"""Values of the reference that are held at a time: 256 MB."""

SAMPLES = 256
"""The most in one batch."""

Meet = Callable[[Callable[..., Any], Any, Any], Any]
"""Takes a call's function, arguments and named arguments; gives its output."""


class Tap(CallMode):
    """Hands the calls that `meets` names over to it, and counts them down.

    Entered in front of a simulation it meets calls with rounded arguments and outputs that are
    not rounded yet.
    """

    def __init__(
        self, model: nn.Module, meets: Mapping[str, Meet], *, all_of: bool = False
    ) -> None:
        super().__init__(model)
        self.meets = meets
        self.left = set(meets)
        self.all_of = all_of

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """Let the call be met, if it is one of them."""
        if name not in self.meets:
            return func(*args, **kwargs)
        out = self.meets[name](func, args, kwargs)
        self.left.discard(name)
        if not self.left and not self.all_of:
            raise _Enough
        return out


class _Enough(Exception):
    """All calls were met: the rest of the forward need not run."""


@torch.no_grad()
def run(
    model: nn.Module,
    inputs: tuple[Any, ...],
    meets: Mapping[str, Meet],
    fake: FakeQuantization | None = None,
    *,
    whole: bool = False,
) -> Any:
    """Run `model` in evaluation mode until every call of `meets` was met.

    Args:
        model: its forward.
        inputs: its arguments.
        meets: what to do at which call.
        fake: rounds as it is set; left out, the model computes in float.
        whole: go on to the end and give the outputs.
    """
    with evaluating(model), _until_enough(), Tap(model, meets, all_of=whole):
        if fake is None:
            return model(*inputs)
        with fake.active(model):
            return model(*inputs)
    return None


@contextmanager
def _until_enough() -> Iterator[None]:
    try:
        yield
    except _Enough:
        return


def beside(
    model: nn.Module,
    reference: nn.Module,
    fake: FakeQuantization,
    inputs: tuple[Any, ...],
    calls: Iterable[Call],
    meet: Callable[[Call, Tensor], Meet],
    of: Callable[[Call, Tensor], Tensor] | None = None,
) -> None:
    """Run the simulation of `model` and meet `calls`, each with what `reference` gives there.

    Takes as many forwards as it takes to hold no more than `HELD` values of the reference.

    Args:
        model: rounded by `fake`; may be changed by what is met.
        reference: in float.
        fake: rounds as it is set.
        inputs: the forward's arguments, one batch.
        calls: in order; those without a floating-point tensor as their output are left out.
        meet: from a call and the reference's output, what to do there.
        of: the little that is needed of that output; with it one forward is enough.
    """
    for group in _fitting(calls) if of is None else [list(calls)]:
        found: dict[str, Tensor] = {}
        run(reference, inputs, {call.name: _kept(found, call, of) for call in group})
        meets = {c.name: meet(c, found[c.name]) for c in group if c.name in found}
        found.clear()
        if meets:
            run(model, inputs, meets, fake)


def _fitting(calls: Iterable[Call]) -> Iterator[list[Call]]:
    """Runs of calls whose outputs together have no more than `HELD` values."""
    group: list[Call] = []
    size = 0
    for call in calls:
        if group and size + _count(call.shape) > HELD:
            yield group
            group, size = [], 0
        group.append(call)
        size += _count(call.shape)
    if group:
        yield group


def _kept(
    found: dict[str, Tensor], call: Call, of: Callable[[Call, Tensor], Tensor] | None
) -> Meet:
    """Computes the call as it is and keeps its output, or what `of` takes of it."""

    def meet(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point():
            # an activation function may write into the output
            found[call.name] = out.clone() if of is None else of(call, out)
        return out

    return meet


def joined(batches: Sequence[tuple[Any, ...]], traced: Trace) -> tuple[Any, ...]:
    """One batch of at most `SAMPLES`, with no tensor of the forward over `LIVE` values.

    Args:
        batches: the forward's arguments; where samples differ in shape, the first batch is taken.
        traced: a forward of the first batch.
    """
    leaves = [t for t in tree_leaves(batches[0]) if isinstance(t, Tensor) and t.dim()]
    first = max((len(t) for t in leaves), default=1)
    largest = max((_count(call.shape) for call in traced.calls), default=1)
    most = min(SAMPLES, max(1, LIVE * first // max(1, largest)))
    shapes = {
        tuple(leaf.shape[1:] if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in x)
        for x in map(tree_leaves, batches)
    }
    alike = len(shapes) == 1 and None not in next(iter(shapes))
    taken = batches if alike else batches[:1]

    def one(*parts: Any) -> Any:
        if not isinstance(parts[0], Tensor) or not parts[0].dim():
            return parts[0]
        return torch.cat([part[:most] for part in parts])[:most]

    return tree_map(one, taken[0], *taken[1:])


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
