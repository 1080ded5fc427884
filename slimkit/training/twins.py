"""What follows a network by hooks of the user's own: averages, BYOL's target, shadow weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from slimkit.pruning.cost import parameters
from slimkit.pruning.coupling import Group
from slimkit.pruning.removal import (
    Attributes,
    Kept,
    fitted,
    kept_positions,
    remove_,
    rescale_,
    tensors_by_name,
)
from slimkit.training.averages import copies_of, held_by_callbacks
from slimkit.training.optimizers import held_by

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule

V = TypeVar("V")


@dataclass(frozen=True)
class Twin:
    """A part that no optimizer trains and that looks like a part that learns.

    Args:
        path: of it, in the LightningModule; empty: a callback holds it.
        of: path of the other, in the network; empty: the network.
        part: itself.
        averages: whether it is known to follow the other, whether it has moved yet or not.
    """

    path: str
    of: str
    part: nn.Module = field(repr=False)
    averages: bool = False


class Twins:
    """What follows a network by the user's own hooks, and must lose the same channels.

    A copy may be a teacher that stays as it is, too: only those whose weights have changed since
    the training began are cut, and those that PyTorch's AveragedModel holds. Dictionaries of
    tensors by the names of the network's parameters, as callbacks keep them for averages or for a
    penalty on the distance from the first weights, are cut in any case.

    Args:
        module: the module.
        trainer: with its optimizers and callbacks, when the training begins.
    """

    def __init__(self, module: SlimModule, trainer: pl.Trainer) -> None:
        self.module, self.trainer = module, trainer
        trained = held_by(trainer.optimizers)
        found = [*twins_of(module.inner, module.network, trained)]
        inside = {
            id(part) for whole in (module, *copies_of(module, trainer)) for part in whole.modules()
        }
        for held in held_by_callbacks(trainer):
            if isinstance(held, nn.Module) and id(held) not in inside:
                shell = nn.ModuleDict({"held": held})
                for twin in twins_of(shell, module.network, trained):
                    if id(twin.part) not in inside:
                        found.append(Twin("", twin.of, twin.part, twin.averages))
        self._first = [(twin, [t.clone() for t in _weights(twin)]) for twin in found]
        self._shapes = {n: t.shape for n, t in tensors_by_name(module.network).items()}

    def moved(self) -> list[Twin]:
        """Those whose weights have changed, and averages."""
        return [
            twin
            for twin, before in self._first
            if twin.averages or not all(map(torch.equal, before, _weights(twin)))
        ]

    def unmoved(self) -> list[Twin]:
        """The others beside the network, of most of it: parts of fixed teachers look alike, too."""
        moved, network = self.moved(), self.module.network
        inside = {id(part) for part in network.modules()}
        least = parameters(network) / 2
        return [
            twin
            for twin, _ in self._first
            if twin not in moved and id(twin.part) not in inside and parameters(twin.part) > least
        ]

    def cut_(self, pairs: Iterable[tuple[Group, Tensor]]) -> tuple[Kept, Attributes]:
        """Cut those that have moved to what stays of the network.

        Returns:
            The kept positions and the numbers of those that lie in the network, by their paths in
            it, for its report.
        """
        pairs = list(pairs)
        kept, numbers = kept_positions(pairs), fitted(pairs)
        inside = {id(part): name for name, part in self.module.network.named_modules()}
        more_kept: Kept = {}
        more_numbers: Attributes = {}
        for twin in self.moved():
            own = inside.get(id(twin.part))
            if own is not None and any(name.startswith(f"{own}.") for name in kept):
                continue  # cut by groups of its own
            cut_twin_(twin.part, twin.of, kept, numbers, pairs)
            if own is not None:
                start = len(twin.of)
                more_kept |= {own + k[start:]: v for k, v in _below(kept, twin.of).items()}
                more_numbers |= {own + k[start:]: v for k, v in _below(numbers, twin.of).items()}
        for shadow in self._shadows(kept):
            _cut_shadow_(shadow, kept, pairs)
        return more_kept, more_numbers

    def _shadows(self, kept: Kept) -> Iterator[dict[str, Tensor]]:
        """Tensors by the network's names, of what callbacks or the user's module keep by names."""
        done = {id(t) for t in tensors_by_name(self.module).values()}
        path = next(n for n, part in self.module.named_modules() if part is self.module.network)
        inner = path.removeprefix("inner").lstrip(".")
        starts = [f"{path}.", f"{inner}." if inner else "", ""]
        theirs = [v for n, v in vars(self.module.inner).items() if not n.startswith("_")]
        for held in (*held_by_callbacks(self.trainer), *theirs):
            if not isinstance(held, dict):
                continue
            for start in starts:
                found = {n: held[start + n] for n in kept if start + n in held}
                found = {
                    n: t
                    for n, t in found.items()
                    if isinstance(t, Tensor) and t.shape == self._shapes[n] and id(t) not in done
                }
                if found:
                    done |= {id(t) for t in found.values()}
                    yield found
                    break


def _cut_shadow_(
    shadow: Mapping[str, Tensor], kept: Kept, pairs: Iterable[tuple[Group, Tensor]]
) -> None:
    """Cut tensors in place, each as the network's of its name."""
    shell = nn.Module()
    for name, tensor in shadow.items():
        *path, last = name.split(".")
        part = shell
        for one in path:
            if one not in part._modules:
                part.add_module(one, nn.Module())
            part = part.get_submodule(one)
        part.register_buffer(last, tensor)
    rescale_(shell, [(g, c) for g, c in pairs if all(p.tensor in shadow for p in g.rescaled)])
    remove_(shell, {name: dims for name, dims in kept.items() if name in shadow})


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


def twins_of(inner: nn.Module, network: nn.Module, trained: Collection[int]) -> list[Twin]:
    """The largest parts of `inner` with the names and shapes of a part that learns.

    Args:
        inner: what is looked through.
        network: whose parts are looked for.
        trained: ids of the parameters that optimizers hold.
    """

    def learns(part: nn.Module) -> bool:
        return any(p.requires_grad and id(p) in trained for p in part.parameters())

    shapes: dict[Any, str] = {}
    for path, part in network.named_modules():
        if learns(part):
            shapes.setdefault(_shape(part), path)
    found: list[Twin] = []
    averaged = {id(p.module) for p in inner.modules() if isinstance(p, AveragedModel)}
    for path, part in inner.named_modules():
        rests = next(part.parameters(), None) is not None and not learns(part)
        inside = any(path.startswith(f"{twin.path}.") for twin in found)
        if path and rests and not inside and (of := shapes.get(_shape(part))) is not None:
            found.append(Twin(path, of, part, id(part) in averaged))
    return found


def _shape(part: nn.Module) -> Any:
    return type(part), tuple((name, tuple(p.shape)) for name, p in part.named_parameters())


def _weights(twin: Twin) -> list[Tensor]:
    """Of the twin, on the CPU, since it may be taken elsewhere meanwhile."""
    return [p.detach().cpu() for p in twin.part.parameters()]


def _below(named: Mapping[str, V], prefix: str) -> dict[str, V]:
    """What has a name below a path."""
    start = f"{prefix}." if prefix else ""
    return {key: value for key, value in named.items() if key.startswith(start) or key == prefix}
