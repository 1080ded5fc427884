"""Finds what a LightningModule's own steps call its network with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slimkit.acceptance import check_samples
from slimkit.batches import LABELS, beside, first_sample, inputs_of
from slimkit.errors import SlimkitError, in_one_line
from slimkit.evaluating import evaluating, replaced
from slimkit.training.classification import Classification, network_of
from slimkit.training.logged import logged

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and named arguments."""
STEPS = ("validation_step", "training_step", "test_step", "predict_step")


def overrides(inner: pl.LightningModule, name: str) -> bool:
    """Whether a LightningModule's class has a hook or step of its own of that name."""
    return getattr(type(inner), name) is not getattr(pl.LightningModule, name)


class Entry:
    """The network's inputs in a batch: what the module's own step would pass to it.

    A step is begun on the batch and broken off at the door of the network, so that no metric, no
    optimizer and no random number moves. The validation step is asked first, since it calls the
    network as a device will, and another one where the network does not run on what that takes of a
    training batch. Where no step comes to the network, inputs are taken from the batch as
    `slimkit.batches.inputs_of` does.

    Args:
        inner: whose steps they are.
        path: of the part that is the network, as a recipe's ``network``; None: all of it.

    Raises:
        SlimkitError: there is no such part.
    """

    def __init__(self, inner: pl.LightningModule, path: str | None = None) -> None:
        self.inner = inner
        self.path = path
        self.network = network_of(inner, path)
        self.whole = isinstance(inner, Classification) and path is None
        self._guessed = False  # whether a guess was tried
        self.steps = [name for name in STEPS if overrides(inner, name)]
        self._chosen: dict[Any, str | None] = {}  # kind of batch -> the step that knows it

    def __call__(self, batch: Any, model: nn.Module | None = None) -> tuple[Any, ...]:
        """Positional arguments of the network, on the device of `model`.

        Args:
            batch: as the module's steps get it, on any device.
            model: the network, or a copy of it.

        Raises:
            SlimkitError: no step gets as far as the network, and the batch does not tell either.
        """
        model = self.network if model is None else model
        if self.whole:
            return inputs_of(batch, model)
        here = next(self.inner.parameters(), torch.zeros(())).device
        there = next(model.parameters(), torch.zeros(()))
        batch = tree_map_only(Tensor, lambda t: t.to(here), batch)
        kind = _kind_of(batch)
        if kind in self._chosen:
            name = self._chosen[kind]
            call = None if name is None else self._call(name, batch)
        else:
            self._chosen[kind], call = self._choose(batch)
        if call is not None:
            inputs = positional(self.network, *call)
            return tree_map_only(Tensor, lambda t: beside(t.detach(), there), inputs)
        inputs = inputs_of(batch, model)
        if not self._guessed:
            self._try(inputs, model)
            self._guessed = True
        return inputs

    def _choose(self, batch: Any) -> tuple[str, Call] | tuple[None, None]:
        """The first step that calls the network on such a batch with what it runs on, and how.

        A validation step may take other batches than a training step: fewer views, say.
        """
        reached: list[tuple[str, Call]] = []
        for name in self.steps:
            call = self._call(name, batch)
            if call is None:
                continue
            reached.append((name, call))
            try:
                inputs = positional(self.network, *call)
                with isolate_rng(), evaluating(self.network), torch.no_grad():
                    self.network(*first_sample(inputs))
            except Exception:  # whatever a model raises where the batch is of another step
                continue
            return name, call
        return reached[0] if reached else (None, None)

    def _try(self, inputs: tuple[Any, ...], model: nn.Module) -> None:
        """Refuse a guess that the network does not take.

        Raises:
            SlimkitError: it does not.
        """
        name = type(self.inner).__name__
        what = f"network {self.path}" if self.path else "own forward"
        try:
            with isolate_rng(), evaluating(model), torch.no_grad():
                model(*inputs)
        except Exception as error:
            raise SlimkitError(
                f"no step of {name} calls its {what} on these batches, which does not take what is "
                f"in them ({type(error).__name__}: {error}): say which part is compressed, "
                f"{_parts_of(self.inner)}, and let training_step or validation_step call it"
            ) from error

    def tried(self, batch: Any) -> tuple[Any, ...]:
        """The network's arguments, on whose first samples it was run once.

        Raises:
            SlimkitError: it does not run on them, or computes something else of two samples.
        """
        inputs = self(batch)
        try:
            with isolate_rng(), evaluating(self.network), torch.no_grad():
                self.network(*first_sample(inputs))
                check_samples(self.network, inputs)
        except SlimkitError:
            raise
        except Exception as error:  # whatever a model raises
            raise SlimkitError(
                f"{type(self.network).__name__} does not run on the first sample of a batch alone "
                f"({in_one_line(error)}): files take tensors whose dimension 0 counts samples. If "
                "it takes something else, such as a list of images, say which part is compressed, "
                f"{_parts_of(self.inner)}"
            ) from error
        return inputs

    def each(self, batches: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...]]]:
        """The batches with nothing but the network's inputs in them."""
        for batch in batches:
            yield (self(batch),)

    def _call(self, name: str, batch: Any) -> Call | None:
        """What the step of that name calls the network with; None if it does not come so far."""
        step = getattr(self.inner, name)
        wanted = list(inspect.signature(step).parameters.values())
        more = [0 for p in wanted[1:] if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        with _broken_off(self.inner, self.network) as entered:
            try:
                step(batch, *more)
            except _Entered:
                return entered[0]
            except Exception:  # the step wants a trainer, or other batches than these
                return None
        return None


_FEW = 4  # parts of a batch; more are samples


def _kind_of(batch: Any) -> Any:
    """What batches of one loader have in common, whose lists may differ in length."""
    if isinstance(batch, Tensor):
        return batch.dim()
    if isinstance(batch, Mapping):
        return tuple((key, _kind_of(batch[key])) for key in batch)
    if isinstance(batch, list | tuple):
        parts = batch if len(batch) <= _FEW else batch[:1]
        return type(batch), tuple(map(_kind_of, parts))
    return type(batch)


class Entered:
    """Batches that can be gone through again, with nothing but the network's inputs in them.

    Args:
        batches: as the module's steps get them.
        entry: to the network.
    """

    def __init__(self, batches: Iterable[Any], entry: Entry) -> None:
        self.batches, self.entry = batches, entry

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...]]]:
        return self.entry.each(self.batches)


def entered(batches: Iterable[Any], model: nn.Module, path: str | None) -> Iterable[Any]:
    """Batches as the steps of a LightningModule pass them on; of other models as they are.

    Args:
        batches: as the module's steps get them.
        model: whose network it is.
        path: of the part that is the network.
    """
    if not isinstance(model, pl.LightningModule):
        return batches
    return Entered(batches, Entry(model, path))


class _Entered(BaseException):
    """The network is called; no `except Exception` of a step stops it."""


@contextmanager
def _broken_off(inner: pl.LightningModule, network: nn.Module) -> Iterator[list[Any]]:
    """Inside, a call of the network is noted and raises; afterwards all is as it was."""
    entered: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        entered.append((args, kwargs))
        raise _Entered

    learning = {p: p.requires_grad for p in inner.parameters()}  # toggle_optimizer changes them
    silent = logged(inner, lambda _name, _value: None)
    try:
        with replaced(network, forward), isolate_rng(), evaluating(inner), silent, torch.no_grad():
            yield entered
    finally:
        for parameter, flag in learning.items():
            parameter.requires_grad_(flag)


def positional(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """A call's arguments as positional ones, without labels that the forward can do without.

    Raises:
        SlimkitError: an argument can only be given by its name.
    """
    wanted = inspect.signature(type(network).forward).parameters
    names = list(wanted)[1:]  # without self
    given: dict[str, Any] = {}
    for name, value in zip(names, args, strict=False):
        if wanted[name].kind is inspect.Parameter.VAR_POSITIONAL:
            break
        given[name] = value
    rest = args[len(given) :]
    given |= kwargs
    for name in [n for n in given if n in LABELS and n in wanted]:
        if wanted[name].default is not inspect.Parameter.empty:
            del given[name]
    places = [n for n in names if wanted[n].kind in _POSITIONAL]
    named = [n for n, value in given.items() if n not in places and value is not None]
    if named:
        raise SlimkitError(
            f"{type(network).__name__} is called with {', '.join(named)} by name, which its "
            "forward takes in no other way: a device's file takes inputs in order; name a part of "
            "it that takes tensors in order with 'network:' in the recipe"
        )
    last = max((places.index(n) for n in given if n in places), default=-1)
    taken = tuple(given.get(n, wanted[n].default) for n in places[: last + 1])
    while taken and taken[-1] is None and not rest:
        taken = taken[:-1]
    return (*taken, *rest)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parts_of(inner: nn.Module) -> str:
    """Its parts with weights, as a recipe names one."""
    parts = [n for n, part in inner.named_children() if next(part.parameters(), None) is not None]
    return " or ".join(f"network: {name}" for name in parts[:4]) or "and give it weights"
