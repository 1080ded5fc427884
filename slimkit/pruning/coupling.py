"""What belongs together: the records that both engines fill and everything else reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Role = Literal["out", "in"]
Attention = Literal["dimensions", "heads"]


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that carries a group's channels.

    Args:
        tensor: dotted path of a parameter or buffer.
        dim: the dimension.
        role: ``out`` where the tensor makes or scales the channels, ``in`` where it reads them.
        channel: int64, one entry per position of the dimension: the group's channel that lives
            there, or -1 where another group's does (behind a concatenation).
        norm: dotted path of the batch-norm right behind the layer; empty if there is none.
    """

    tensor: str
    dim: int
    role: Role
    channel: Tensor
    norm: str = ""


@dataclass(frozen=True)
class Fit:
    """A whole number that a module of the user's code holds and that follows a group's size.

    Args:
        module: dotted path.
        attribute: the number's name, such as ``num_heads`` or ``head_dim``.
        each: how much of it one channel of the group is.
    """

    module: str
    attribute: str
    each: int


@dataclass(frozen=True)
class Rescaled:
    """Positions of a tensor that attention divides by the root of a group's size.

    Where channels go, these are multiplied by the root of the fraction that stays, so that the
    products of queries and keys are scaled as before.
    """

    tensor: str
    dim: int
    positions: Tensor

    def overlaps(self, other: Rescaled) -> bool:
        """Whether another one has positions of the same tensor: attention that is called twice."""
        same = (self.tensor, self.dim) == (other.tensor, other.dim)
        return same and bool(torch.isin(self.positions, other.positions).any())


@dataclass(frozen=True)
class Group:
    """Channels that several layers share; they are kept or removed in all of them at once.

    Args:
        name: the first layer of the model that makes the channels.
        channels: how many there are.
        members: the tensors that carry them.
        doubtful: whether they pass an operation with a size in it (a view, a split) that may be a
            constant of the user's code, or may follow the channels: only running it tells.
        candidates: numbers in the user's modules that may have to follow the size.
        fits: those that do.
        rescaled: queries of attention that is scaled by the group's size.
        normed: whether a channel of zeros is not an absent one: something is computed over all of
            them (a LayerNorm, a mean), or made of a zero (a sigmoid).
        first: whether the channels are those of the first convolution over an image or a signal,
            and of nothing else.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    doubtful: bool = False
    candidates: tuple[Fit, ...] = ()
    fits: tuple[Fit, ...] = ()
    rescaled: tuple[Rescaled, ...] = ()
    normed: bool = False
    first: bool = False

    @property
    def layers(self) -> list[str]:
        """The coupled layers, without the tensors' own names."""
        return list(dict.fromkeys(m.tensor.rpartition(".")[0] for m in self.members))

    @cached_property
    def partial(self) -> list[Member]:
        """The tensors that hold some of the channels only."""
        return [m for m in self.members if len(m.channel[m.channel >= 0].unique()) < self.channels]

    @property
    def makers(self) -> list[str]:
        """The layers whose own channels the group's are, not those that read them."""
        made = [m.tensor.rpartition(".")[0] for m in self.members if m.role == "out"]
        return list(dict.fromkeys([self.name, *made]))


@dataclass(frozen=True)
class Coupling:
    """All groups of a model, and what must stay whole with the reason.

    Args:
        groups: what may be cut.
        frozen: a layer's name to the reason.
        training: whether some layers run in training mode only (auxiliary heads), so that a cut
            must be tried there too.
    """

    groups: tuple[Group, ...]
    frozen: dict[str, str]
    training: bool = False
