"""Whom a student learns from: fixed models, an average of itself, a peer that learns too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from slimkit.batches import samples_of
from slimkit.errors import SlimkitError
from slimkit.places import Place
from slimkit.recipe import Distill
from slimkit.recipe import Teacher as Wanted
from slimkit.training.catching import catching, module_paths
from slimkit.training.digest import code_of, digest
from slimkit.training.logged import logged
from slimkit.training.teacher_cache import Given, TeacherCache, key_of

Say = Callable[[str], None]


class Teacher:
    """A fixed network that is shown what the student is shown: eval mode, no gradients.

    Args:
        network: it is the teacher's own.
        wanted: what the recipe says of it.
        recipe: the distill section.
    """

    def __init__(self, network: nn.Module, wanted: Wanted, recipe: Distill) -> None:
        self.network = network.eval()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self.name = wanted.name
        self.share = wanted.weight
        self.precision = recipe.precision
        self.places: dict[str, Place] = {}  # by text
        self._folder = recipe.cache if wanted.is_fixed else None
        self._cache: TeacherCache | None = None
        self._apart: bool | None = None
        self._device: torch.device | None = None

    @property
    def who(self) -> str:
        """As messages call it."""
        return "the dense teacher" if self.name == "dense" else f"the teacher {self.name}"

    def watch(self, text: str) -> None:
        """Give what is at this place from now on.

        Raises:
            SlimkitError: there is no such module.
        """
        if text not in self.places:
            try:
                self.places[text] = Place.of(text, module_paths(self.network))
            except SlimkitError as error:
                raise SlimkitError(f"{self.who} {error}") from error

    def move_to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Be where the student is, and compute in what it computes in."""
        own = next((p.dtype for p in self.network.parameters()), dtype)
        if device != self._device or (dtype is not None and dtype != own):
            self.network.to(device, dtype)
            self._device = device

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], say: Say) -> Given:
        """What it gives for the student's inputs, by place; from the cache, if it is there."""
        if self._folder is None:
            return self._forward(args, kwargs)
        if self._cache is None:
            self._cache = TeacherCache(self._folder, self._identity(), say)
        key = key_of(args, kwargs)
        given = self._cache.find(key)
        if given is None:
            given = self._forward(args, kwargs)
            if self._apart is None:
                self._apart = bool(key.samples) and self._gives_samples_apart(args, kwargs, given)
            rows = all(t.dim() and len(t) == len(key.samples) for t in given.values())
            self._cache.keep(key, given, self._apart and rows)
        return {place: t.to(self._device) for place, t in given.items()}

    @property
    def cache(self) -> TeacherCache | None:
        """Where its outputs are kept, once it was asked."""
        return self._cache

    def _identity(self) -> str:
        """A hash of all that its outputs depend on but the inputs."""
        kind = "cpu" if self._device is None else self._device.type
        cast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        about = [code_of(self.network), sorted(self.places), self.precision or cast]
        return digest(json.dumps(about), self.network.state_dict())

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        with (
            catching(self.network, self.places.values(), self.who) as catch,
            torch.no_grad(),
            self._cast(),
        ):
            self.network(*args, **kwargs)
            try:
                return {text: catch.tensor(place).detach() for text, place in self.places.items()}
            except SlimkitError as error:
                raise SlimkitError(f"distill: {error}") from error

    def _cast(self) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast("cpu" if self._device is None else self._device.type, torch.bfloat16)

    def _gives_samples_apart(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Given
    ) -> bool:
        """Whether the first sample alone gets what it got in the batch."""
        try:
            (some,) = samples_of((dict(kwargs),), 0, 1)
            alone = self._forward(samples_of(args, 0, 1), some)
        except Exception:  # a model that cannot take one sample has a reason of its own
            return False
        scale = 0.05 if self.precision else 1e-3
        return all(
            t.shape[0] == 1
            and t.shape[1:] == given[place].shape[1:]
            and torch.allclose(t[0], given[place][0], rtol=scale, atol=scale * float(t.abs().max()))
            for place, t in alone.items()
            if t.dim()
        )


class Average(Teacher):
    """The exponential moving average of the student's own weights (Tarvainen and Valpola 2017).

    Mean teachers are better role models, https://arxiv.org/abs/1703.01780. The first steps count
    more: at step t it keeps the smaller of the decay and (1 + t) / (10 + t) of itself. Statistics
    of batch-norm are averaged in the same way.

    Args:
        network: a copy of the student; whoever cuts the student's channels cuts it, too.
        wanted: what the recipe says of it.
        recipe: the distill section.
    """

    def __init__(self, network: nn.Module, wanted: Wanted, recipe: Distill) -> None:
        super().__init__(network, wanted, recipe)
        self.decay = 0.999 if wanted.decay is None else wanted.decay
        self.steps = 0

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Take the student's weights after an optimizer step into account."""
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        mine = [*self.network.parameters(), *self.network.buffers()]
        theirs = [*student.parameters(), *student.buffers()]
        for average, now in zip(mine, theirs, strict=True):
            now = now.to(average.device)
            if average.is_floating_point():
                average.lerp_(now.to(average.dtype), 1 - keep)
            else:
                average.copy_(now)


class Peer(Teacher):
    """A second student, trained beside the first one, that learns from it in turn.

    Zhang et al. 2018, Deep Mutual Learning, https://arxiv.org/abs/1706.00384. Its own step gives
    the loss on the labels. Its parameters are in the student's optimizer.

    Args:
        module: the LightningModule whose step trains it, and its network.
        wanted: what the recipe says of it.
        recipe: the distill section.
    """

    def __init__(
        self, module: tuple[pl.LightningModule, nn.Module], wanted: Wanted, recipe: Distill
    ) -> None:
        trainable = [p for p in module[0].parameters() if p.requires_grad]
        super().__init__(module[1], wanted, recipe)
        for parameter in trainable:
            parameter.requires_grad_(True)
        self.module = module[0]
        self.label_loss = torch.zeros(())

    @property
    def who(self) -> str:
        """As messages call it."""
        return f"the peer {self.name}"

    def move_to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Be where the student is, and compute in what it computes in."""
        own = next((p.dtype for p in self.network.parameters()), dtype)
        if device != self._device or (dtype is not None and dtype != own):
            self.module.to(device=device, dtype=dtype)
            self._device = device

    def step(self, batch: Any, batch_idx: int, trainer: pl.Trainer | None) -> Given:
        """Its own training step; what it gives keeps its gradients.

        Raises:
            SlimkitError: its step returns no loss.
        """
        self.module.train()
        with (
            _of(trainer, self.module),
            catching(self.network, self.places.values(), self.who) as catch,
            logged(self.module, lambda _name, _value: None),
        ):
            output: Any = self.module.training_step(batch, batch_idx)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor):
                raise SlimkitError(
                    f"distill: {self.who} has no loss: its training_step returned "
                    f"{type(loss).__name__}"
                )
            self.label_loss = loss
            return {text: catch.tensor(place) for text, place in self.places.items()}

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], say: Say) -> Given:
        """Never asked: it makes a step of its own on the batch."""
        raise NotImplementedError


@contextmanager
def _of(trainer: pl.Trainer | None, module: pl.LightningModule) -> Iterator[None]:
    """Inside, `module` knows the trainer; copies of it must not copy a trainer."""
    module.trainer = trainer
    try:
        yield
    finally:
        module.trainer = None
