"""Runs a function of a model again after a change, and computes only what the change reaches.

A first run on a few samples writes down which call reads what. What is not behind a changed
parameter is then kept from the unchanged run of a batch and given back: the layers in front of
the change, and branches beside it. Only outputs that some later run needs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimkit.calls import CallMode, map_tensors, operation_name

Run = Callable[[], Any]
"""Calls the model on one batch; the result may be anything that holds tensors."""


@dataclass(frozen=True)
class _Event:
    """One call: what it read, and what it made or wrote into.

    Args:
        name: as `CallMode` names it; empty for a call outside the model's modules.
        reads: storages of the tensors it was given.
        makers: names of the calls that made these tensors.
        writes: storages of what it made and of what it changed.
        always: whether it changes a tensor and gives none, so that nothing can be given back.
    """

    name: str
    reads: frozenset[int]
    makers: frozenset[str]
    writes: frozenset[int]
    always: bool


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or -id(tensor)  # an empty one has no place


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Recorder(CallMode):
    """Writes down every call, those outside of the model's modules too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.events: list[_Event] = []
        self.makers: dict[int, str] = {}
        self.changed: list[tuple[int, int]] = []  # (event, storage)
        self._alive: list[Any] = []  # an id is only unique while its tensor lives

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self._stack or not operation_name(func):
            return self.on_call("", "", func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        given = _tensors((args, kwargs))
        versions = [t._version for t in given]
        makers = frozenset(filter(None, (self.makers.get(id(t), "") for t in given)))
        out = func(*args, **kwargs)
        made = _tensors(out)
        changed = [t for t, v in zip(given, versions, strict=True) if t._version != v]
        self.changed += [(len(self.events), _storage(t)) for t in changed]
        reads = frozenset(map(_storage, given))
        writes = frozenset(map(_storage, [*made, *changed]))
        self.events.append(_Event(name, reads, makers, writes, bool(changed) and not made))
        self.makers.update((id(t), name) for t in made)
        self._alive += [given, made]
        return out


class _Keeper(CallMode):
    """Keeps what calls give: the tensors of those in `needed`, of the others only the shapes."""

    def __init__(self, model: nn.Module, needed: Collection[str], fragile: Collection[str]) -> None:
        super().__init__(model)
        self.needed, self.fragile = needed, fragile
        self.kept: dict[str, Any] = {}

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        out = func(*args, **kwargs)
        if name not in self.needed:
            self.kept[name] = map_tensors(lambda t: t.new_zeros(()).expand(t.shape), out)
        else:
            self.kept[name] = map_tensors(torch.clone, out) if name in self.fragile else out
        return out


class _Unlike(Exception):
    """The model makes a call that it did not make before."""


class _Replay(CallMode):
    """Computes the calls in `runs` and gives back what was kept of all others."""

    def __init__(
        self,
        model: nn.Module,
        runs: Collection[str],
        kept: Mapping[str, Any],
        fragile: Collection[str],
    ) -> None:
        super().__init__(model)
        self.runs, self.fragile = runs, fragile
        self.kept = dict(kept)

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        if name in self.runs:
            return func(*args, **kwargs)
        if name not in self.kept:
            raise _Unlike(name)
        kept = self.kept.pop(name)  # a second call of the name is another one
        return map_tensors(torch.clone, kept) if name in self.fragile else kept


class Reuse:
    """What of a model's run on a batch can be used again when one of several changes is made.

    Args:
        model: in evaluation mode.
        run: calls it on few samples.
        changes: name of a change to the parameters and buffers (dotted paths) that it writes into.
    """

    def __init__(self, model: nn.Module, run: Run, changes: Mapping[str, Collection[str]]) -> None:
        self.model = model
        recorder = _Recorder(model)
        with torch.no_grad(), recorder:
            result = run()
        events = recorder.events
        names = [event.name for event in events if event.name]
        self.runs: dict[str, frozenset[str]] = {}
        self.needed: set[str] = set()
        self.fragile = _written_into_later(recorder)
        self.kept: dict[str, Any] = {}
        if len(set(names)) < len(names):  # a module that is called by itself several times
            return
        last = frozenset(filter(None, (recorder.makers.get(id(t), "") for t in _tensors(result))))
        state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state.update(model.named_buffers(remove_duplicate=False))
        for change, paths in changes.items():
            reached = {_storage(state[path]) for path in paths}
            runs, read = set[str](), set(last)
            for event in events:
                behind = not reached.isdisjoint(event.reads)
                if behind:
                    reached |= event.writes
                if behind or event.always or not event.name:
                    runs.add(event.name)
                    read |= event.makers
            self.runs[change] = frozenset(runs)
            self.needed |= read - runs

    @torch.no_grad()
    def unchanged(self, run: Run) -> Any:
        """The result of the model as it is; what later runs on the same batch need is kept."""
        self.kept = {}
        if not self.runs:
            return run()
        keeper = _Keeper(self.model, self.needed, self.fragile)
        with keeper:
            result = run()
        self.kept = keeper.kept
        return result

    @torch.no_grad()
    def changed(self, change: str, run: Run) -> Any:
        """The result where `change` has been made; `unchanged` must have seen the batch."""
        if change in self.runs:
            try:
                with _Replay(self.model, self.runs[change], self.kept, self.fragile):
                    return run()
            except _Unlike:
                self.distrust(change)
        return run()

    def distrust(self, change: str) -> None:
        """From now on compute everything when `change` is made."""
        self.runs.pop(change, None)


def _written_into_later(recorder: _Recorder) -> frozenset[str]:
    """The calls whose outputs are changed in place by a later one."""
    last = dict(sorted((storage, event) for event, storage in recorder.changed))
    return frozenset(
        event.name
        for number, event in enumerate(recorder.events)
        if any(last.get(storage, -1) > number for storage in event.writes)
    )
