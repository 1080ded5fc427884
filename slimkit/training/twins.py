"""Frozen copies of the network in a LightningModule that its own hooks average, as BYOL does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from slimkit.pruning.coupling import Group
from slimkit.pruning.removal import Attributes, Kept, fitted, kept_positions, remove_, rescale_

V = TypeVar("V")


@dataclass(frozen=True)
class Twin:
    """A frozen part that looks like a part that learns.

    Args:
        path: of it, in the LightningModule.
        of: path of the other, in the network; empty: the network.
    """

    path: str
    of: str


class Twins:
    """What follows a network by the user's own hooks, and must lose the same channels.

    A frozen copy may be a teacher that stays as it is, too: only those whose weights have changed
    since the training began are cut.

    Args:
        inner: the LightningModule.
        network: its network.
    """

    def __init__(self, inner: pl.LightningModule, network: nn.Module) -> None:
        self.inner, self.network = inner, network
        self._first = {twin: _weight(inner, twin).clone() for twin in twins_of(inner, network)}

    def moved(self) -> list[Twin]:
        """Those whose weights have changed."""
        return [
            twin
            for twin, before in self._first.items()
            if before.shape != _weight(self.inner, twin).shape
            or not torch.equal(before.cpu(), _weight(self.inner, twin).cpu())
        ]

    def cut_(self, pairs: Iterable[tuple[Group, Tensor]]) -> dict[str, Kept]:
        """Cut those that have moved to what stays of the network; path in the network to positions.

        Those outside of the network have no path there and are left out of what is returned.
        """
        pairs = list(pairs)
        kept, numbers = kept_positions(pairs), fitted(pairs)
        inside = {id(part): name for name, part in self.network.named_modules()}
        found = {}
        for twin in self.moved():
            part = self.inner.get_submodule(twin.path)
            cut_twin_(part, twin.of, kept, numbers, pairs)
            if id(part) in inside:
                name = inside[id(part)]
                mine = _below(kept, twin.of)
                found[name] = {f"{name}{key[len(twin.of) :]}": dims for key, dims in mine.items()}
        return found


def cut_twin_(
    part: nn.Module,
    of: str,
    kept: Kept,
    numbers: Attributes,
    pairs: Iterable[tuple[Group, Tensor]] = (),
) -> None:
    """Cut a module as the part of the network at the path `of` is cut."""
    shell = part
    for name in reversed(of.split(".") if of else []):
        outer = nn.Module()
        outer.add_module(name, shell)
        shell = outer
    whole = [(g, c) for g, c in pairs if _below(dict.fromkeys(p.tensor for p in g.rescaled), of)]
    rescale_(shell, whole)
    remove_(shell, _below(kept, of), _below(numbers, of))


def twins_of(inner: nn.Module, network: nn.Module) -> list[Twin]:
    """The largest frozen parts of `inner` that have the names and shapes of a part that learns."""
    shapes: dict[Any, str] = {}
    for path, part in network.named_modules():
        if any(p.requires_grad for p in part.parameters()):
            shapes.setdefault(_shape(part), path)
    found: list[Twin] = []
    for path, part in inner.named_modules():
        parameters = list(part.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        inside = any(path.startswith(f"{twin.path}.") for twin in found)
        if path and frozen and not inside and (of := shapes.get(_shape(part))) is not None:
            found.append(Twin(path, of))
    return found


def _shape(part: nn.Module) -> Any:
    return type(part), tuple((name, tuple(p.shape)) for name, p in part.named_parameters())


def _weight(inner: nn.Module, twin: Twin) -> Tensor:
    return next(inner.get_submodule(twin.path).parameters()).detach()


def _below(named: Mapping[str, V], prefix: str) -> dict[str, V]:
    """What has a name below a path."""
    start = f"{prefix}." if prefix else ""
    return {key: value for key, value in named.items() if key.startswith(start) or key == prefix}
