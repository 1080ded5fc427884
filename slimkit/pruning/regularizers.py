"""Penalties that make whole channels small while the model trains, so that their cut costs little.

A regularizer never enters the loss: it adds the gradient of its penalty to the parameters' own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimkit.errors import PruningError
from slimkit.pruning.coupling import Group


@dataclass(frozen=True)
class Place:
    """One dimension of one parameter that carries channels of a group.

    Args:
        parameter: keeps its identity until the cut.
        dim: the dimension.
        channel: int64, for each position of it the group's channel, or -1 for another group's.
    """

    parameter: nn.Parameter
    dim: int
    channel: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """One value a channel, of shape (channels,), at the positions; 0 at another group's."""
        padded = torch.cat([values, values.new_zeros(1)])
        shape = [-1 if d == self.dim else 1 for d in range(self.parameter.dim())]
        return padded[self.channel].reshape(shape)

    def squares(self, channels: int) -> Tensor:
        """Sum of the squared weights of each channel, shape (channels,)."""
        others = [d for d in range(self.parameter.dim()) if d != self.dim]
        precise = torch.promote_types(self.parameter.dtype, torch.float32)
        sums = self.parameter.detach().to(precise).square().sum(others)
        totals = sums.new_zeros(channels + 1)  # the last for other groups'
        return totals.index_add_(0, self.channel % (channels + 1), sums)[:-1]


class Regularizer(ABC):
    """Pulls channels towards zero.

    Args:
        model: whose parameters are penalised.
        groups: those whose channels may be removed; all other weights are left alone.
        strength: factor of the penalty.
    """

    default: ClassVar[float]
    """The strength where a recipe names none."""
    nothing: ClassVar[str] = "the regularizer finds no weights of channels that may go"
    """The error where there is nothing to penalise."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], strength: float | None = None
    ) -> None:
        self.strength = self.default if strength is None else strength
        self.channels = {group.name: group.channels for group in groups}
        self.places = {group.name: self._places(model, group) for group in groups}
        if not any(self.places.values()):
            raise PruningError(self.nothing)

    def _places(self, model: nn.Module, group: Group) -> list[Place]:
        """Where the group's weights are: the tensors that criteria score."""
        return _places(group, dict(model.named_parameters(remove_duplicate=False)), 2)

    @abstractmethod
    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The penalty's gradient, in parts that add up; each broadcasts to its parameter."""

    @torch.no_grad()
    def add_(self, parameters: Collection[nn.Parameter]) -> None:
        """Add the penalty's gradient to that of the loss, of those `parameters` that have one."""
        held = {id(parameter) for parameter in parameters}
        for parameter, gradient in self.gradients():
            if id(parameter) in held and parameter.grad is not None:
                parameter.grad.add_(gradient)


class BNScale(Regularizer):
    """Sum of the absolute gammas of the batch-norms that channels pass, by its subgradient.

    Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming,
    https://arxiv.org/abs/1708.06519; the default strength is theirs for 160 epochs of VGG on CIFAR,
    and hardly moves a gamma in a short training.
    """

    default = 1e-4
    nothing = (
        "regularizer bn-scale finds no batch-norm behind channels that may go: choose group-lasso"
    )

    def _places(self, model: nn.Module, group: Group) -> list[Place]:
        modules = model.named_modules(remove_duplicate=False)
        norms = {name: m for name, m in modules if isinstance(m, _BatchNorm) and m.affine}
        return _places(group, {f"{name}.weight": norm.weight for name, norm in norms.items()}, 1)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The sign of each gamma, and 0 at 0."""
        for name, places in self.places.items():
            for place in places:
                gamma = place.parameter
                inside = place.spread(gamma.new_full((self.channels[name],), self.strength))
                yield gamma, gamma.sign() * inside


class GroupLasso(Regularizer):
    """Sum of the channels' L2 norms, each over the weights of all coupled layers.

    Wen et al. 2016, Learning Structured Sparsity in Deep Neural Networks,
    https://arxiv.org/abs/1608.03665. A channel's weights are those that make it and those that
    read it; biases and batch-norm do not count.
    """

    default = 1e-2

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight over the norm of its channel, and 0 where the channel is 0."""
        for name, places in self.places.items():
            if not places:
                continue
            squares = [place.squares(self.channels[name]) for place in places]
            norms = torch.stack(squares).sum(0).sqrt()
            factors = torch.where(norms > 0, self.strength / norms, 0.0)
            for place in places:
                yield place.parameter, place.parameter * place.spread(factors)


class Growing(Regularizer):
    """Half the squared weights of chosen channels, times a factor that grows until they go.

    Wang et al. 2021, Neural Pruning via Growing Regularization,
    https://arxiv.org/abs/2012.09243 (GReg-1; the default strength is its ceiling). A channel's
    weights are those that make it and those that read it.
    """

    default = 1.0

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], strength: float | None = None
    ) -> None:
        super().__init__(model, groups, strength)
        self.chosen: dict[str, Tensor] = {}  # group to the channel numbers that are penalised
        self.grown = 0.0  # the share of the strength that is reached

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight of a chosen channel times the factor."""
        for name, places in self.places.items():
            if name not in self.chosen:
                continue
            for place in places:
                factors = place.parameter.new_zeros(self.channels[name])
                factors[self.chosen[name]] = self.strength * self.grown
                yield place.parameter, place.parameter * place.spread(factors)


REGULARIZERS: dict[str, type[Regularizer]] = {
    "bn-scale": BNScale,
    "group-lasso": GroupLasso,
    "growing": Growing,
}


def _places(group: Group, tensors: dict[str, nn.Parameter], least: int) -> list[Place]:
    """The group's members among `tensors` of at least so many dimensions, tied ones once."""
    found: dict[tuple[int, int], Place] = {}
    for member in group.members:
        tensor = tensors.get(member.tensor)
        if tensor is not None and tensor.dim() >= least:
            place = Place(tensor, member.dim, member.channel.to(tensor.device))
            found.setdefault((id(tensor), member.dim), place)
    return [*found.values()]
