"""What the student learns from its teachers, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from slimkit.batches import inputs_of, labels_of
from slimkit.errors import PluginError, SlimkitError
from slimkit.interfaces import DistillationLoss
from slimkit.places import Place
from slimkit.recipe import Distill, Loss, Optimizer
from slimkit.registry import Listed, blame, discover
from slimkit.training.catching import Catch, catching, module_paths
from slimkit.training.loss_weights import weight_at
from slimkit.training.teacher_cache import Given
from slimkit.training.teachers import Average, Peer, confidence, mixed, teachers_of

Say = Callable[[str], None]
Shapes = tuple[tuple[int, ...], ...]


class Distillation:
    """Compares student and teachers at the places that the recipe names.

    The student's tensors are caught by forward hooks during its own training step, so any
    LightningModule works; teachers then run on the same inputs. What it owns (parameters of losses,
    an average of the student, peers) is in no state dict: `state` gives it for the checkpoint.

    Args:
        inner: the student's LightningModule, or its network.
        student: the network being trained, as it is before anything is compressed.
        recipe: the distill section.
        optimizer: for a peer that is a plain module.
        say: told of what is skipped, with one line.

    Raises:
        SlimkitError: a place, plugin or teacher is not there or cannot be used as the recipe does.
    """

    def __init__(
        self,
        inner: pl.LightningModule | nn.Module,
        student: nn.Module,
        recipe: Distill,
        optimizer: Optimizer | None = None,
        say: Say = lambda _line: None,
    ) -> None:
        self.student = student
        self.recipe = recipe
        self.say = say
        self.teachers = teachers_of(recipe, inner, student, optimizer or Optimizer())
        self.comparisons: list[Comparison] = []
        modules = module_paths(student)
        for entry in recipe.losses:
            self.comparisons.append(self._comparison(entry, modules))
        self._name_apart()
        self.tried = False  # whether every loss has been looked at on a batch

    def _comparison(self, entry: Loss, modules: Sequence[str]) -> Comparison:
        where = f"distill: loss {entry.name!r}"
        try:
            places = [Place.of(text, modules) for text in entry.sides[0]]
        except SlimkitError as error:
            raise SlimkitError(f"{where}: the model {error}") from error
        try:
            for teacher in self.teachers:
                for text in entry.sides[1]:
                    teacher.watch(text)
        except SlimkitError as error:
            raise SlimkitError(f"{where}: {error}") from error
        count = 1 if self.recipe.weighting == "confidence" else len(self.teachers)
        return Comparison(entry, places, count, any(isinstance(t, Peer) for t in self.teachers))

    def _name_apart(self) -> None:
        """Two entries of the same loss at the same place are told apart by a number."""
        names: dict[str, int] = {}
        for comparison in self.comparisons:
            number = names[comparison.name] = names.get(comparison.name, 0) + 1
            if number > 1:
                comparison.name += f"#{number}"

    @property
    def averages(self) -> list[Average]:
        """The teachers that follow the student's weights."""
        return [teacher for teacher in self.teachers if isinstance(teacher, Average)]

    @property
    def peers(self) -> list[Peer]:
        """The teachers that learn."""
        return [teacher for teacher in self.teachers if isinstance(teacher, Peer)]

    def watching(self) -> AbstractContextManager[Catch]:
        """Inside, what the student's forward takes and gives is caught."""
        places = [place for comparison in self.comparisons for place in comparison.places]
        return catching(self.student, places, "the student")

    def losses_of(
        self,
        caught: Catch,
        batch: Any,
        batch_idx: int = 0,
        now: float = 0.0,
        trainer: pl.Trainer | None = None,
    ) -> dict[str, Tensor]:
        """Each loss, weighted: name to scalar; and what peers learn, under their names.

        Args:
            caught: of the student's forward on the batch.
            batch: gives labels, and the inputs where the training step went round the forward.
            batch_idx: its number in the epoch, for the step of peers.
            now: fraction of the training that has passed.
            trainer: for the step of peers.

        Raises:
            PluginError: a loss fails or is no scalar; or, on the first batch, not finite or
                without a gradient to the student.
            SlimkitError: a place gives no single tensor.
        """
        if not caught.called:  # the training step went round the forward: run it once more
            with self.watching() as caught:
                self.student(*inputs_of(batch, self.student))
        mine = [
            tuple(caught.tensor(place) for place in comparison.places)
            for comparison in self.comparisons
        ]
        parameter = next(self.student.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        given: list[Given] = []
        for teacher in self.teachers:
            teacher.move_to(device)
            if isinstance(teacher, Peer):
                given.append(teacher.step(batch, batch_idx, trainer))
            else:
                given.append(teacher.look(caught.args, caught.kwargs, self.say))
        taught = [{place: t.detach() for place, t in g.items()} for g in given]
        shares = [teacher.share for teacher in self.teachers]
        if self.recipe.weighting == "confidence":
            first = self.recipe.losses[0].sides[1][0]
            sure = confidence(taught, first, labels_of(batch).to(device), shares)
            taught, shares = [mixed(taught, sure)], [1.0]
        result: dict[str, Tensor] = {}
        for comparison, student in zip(self.comparisons, mine, strict=True):
            weight = weight_at(comparison.entry.weight, now)
            values = []
            for n, (tensors, share) in enumerate(zip(taught, shares, strict=True)):
                theirs = tuple(tensors[text] for text in comparison.entry.sides[1])
                who = self.teachers[n].who if len(taught) > 1 else "teacher"
                value = comparison.value(n, student, theirs, batch, who)
                if not self.tried:
                    comparison.look_at(value, student, theirs, self.say)
                values.append(share / sum(shares) * value if len(shares) > 1 else value)
            result[comparison.name] = weight * (sum(values[1:], values[0]))
            for teacher, tensors in zip(self.teachers, given, strict=True):
                if isinstance(teacher, Peer):
                    theirs = tuple(tensors[text] for text in comparison.entry.sides[1])
                    back = comparison.value(-1, theirs, tuple(t.detach() for t in student), batch)
                    name = f"{teacher.name}/{comparison.name}"
                    result[name] = result.get(name, 0.0) + weight * back
        for teacher in self.peers:
            label_weight = weight_at(self.recipe.label_weight, now)
            result[f"{teacher.name}/labels"] = label_weight * teacher.label_loss
        self.tried = True
        return result

    def parameters(self) -> dict[str, nn.Parameter]:
        """What losses learn, by a name of its own; empty before the first batch."""
        return {
            f"{comparison.name}.{n}.{name}": parameter
            for comparison in self.comparisons
            for n, loss in enumerate(comparison.losses)
            for name, parameter in loss.named_parameters()
        }

    def peer_parameters(self) -> dict[str, nn.Parameter]:
        """What peers learn, by a name of its own."""
        return {
            f"{n}.{name}": parameter
            for n, peer in enumerate(self.peers)
            for name, parameter in peer.network.named_parameters()
            if parameter.requires_grad
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: parameters of losses with shapes, averages, peers."""
        return {
            "losses": [comparison.state() for comparison in self.comparisons],
            "averages": [(a.network.state_dict(), a.steps) for a in self.averages],
            "peers": [peer.module.state_dict() for peer in self.peers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; averages have been cut to their shapes by then.

        Raises:
            SlimkitError: it is of another recipe.
        """
        fits = (
            len(state["losses"]) == len(self.comparisons)
            and len(state["averages"]) == len(self.averages)
            and len(state["peers"]) == len(self.peers)
        )
        if not fits:
            raise SlimkitError(
                "the checkpoint was written with other losses or teachers: go on with the recipe "
                "that it was made by"
            )
        for comparison, saved in zip(self.comparisons, state["losses"], strict=True):
            comparison.load(saved)
        for average, (weights, steps) in zip(self.averages, state["averages"], strict=True):
            average.network.load_state_dict(weights)
            average.steps = steps
        for peer, weights in zip(self.peers, state["peers"], strict=True):
            peer.module.load_state_dict(weights)


class Comparison:
    """One loss of the recipe between the student and each teacher.

    Args:
        entry: of the recipe.
        places: where the student's tensors are taken.
        teachers: how many there are.
        both_ways: whether peers learn from it, too.

    Raises:
        SlimkitError: the loss compares another number of places.
    """

    def __init__(
        self, entry: Loss, places: Sequence[Place], teachers: int, both_ways: bool
    ) -> None:
        self.entry = entry
        self.places = places
        self.plugin: Listed = discover().find("loss", entry.name)
        self.losses: list[DistillationLoss] = [
            discover().create("loss", entry.name, entry.options) for _ in range(teachers)
        ]
        self.shapes: list[tuple[Shapes, Shapes] | None] = [None] * teachers
        self.both_ways = both_ways
        kind = type(self.losses[0])
        for side, texts in zip(("student", "teacher"), entry.sides, strict=True):
            if len(texts) != kind.places:
                raise SlimkitError(
                    f"distill: loss {entry.name!r} compares {kind.places} at once, but 'at' names "
                    f"{len(texts)} of the {side}: "
                    + (
                        "write one entry for each"
                        if kind.places == 1
                        else "write at: [[first, second]]"
                    )
                )
        unknown = kind.needs - {"labels"}
        if unknown:
            raise PluginError(
                f"{self.plugin} needs {', '.join(sorted(unknown))}, which no batch has: `needs` "
                "may name labels"
            )
        self.name = f"{entry.name}@{self.where}"

    @property
    def where(self) -> str:
        """The places, for people and loggers."""
        return "/".join(dict.fromkeys("+".join(side) for side in self.entry.sides))

    def value(
        self,
        n: int,
        student: tuple[Tensor, ...],
        teacher: tuple[Tensor, ...],
        batch: Any,
        who: str = "teacher",
    ) -> Tensor:
        """The loss between one side and another.

        Args:
            n: which teacher's; -1 for what a peer learns from the student.
            student: of each place, with gradients.
            teacher: of each place, without.
            batch: with labels, where the loss needs them.
            who: the teacher, for messages.

        Raises:
            PluginError: the loss fails, or is no scalar.
            SlimkitError: the batch has no labels.
        """
        loss = self.losses[n]
        more = {}
        if "labels" in loss.needs:
            try:
                more = {"labels": labels_of(batch).to(student[0].device)}
            except SlimkitError as error:
                raise SlimkitError(f"distill: loss {self.entry.name!r}: {error}") from error
        sides: tuple[Any, Any] = (student, teacher)
        if loss.places == 1:
            sides = student[0], teacher[0]
        with blame(self.plugin, f"comparing student and {who} at {self.where}"):
            if n >= 0 and self.shapes[n] is None:
                self.prepare(n, student, teacher)
            value = loss(*sides, **more)
        if not isinstance(value, Tensor) or value.dim() != 0:
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise PluginError(f"{self.plugin} must return a scalar tensor, not {what}")
        if not value.requires_grad and any(t.requires_grad for t in student):
            raise PluginError(f"{self.plugin} returned a loss without gradient to the student")
        return value

    def look_at(
        self, value: Tensor, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], say: Say
    ) -> None:
        """Look at the first value of a training, before anything has learnt from it.

        Raises:
            PluginError: it is not finite, or has no gradient to the student's tensors.
        """
        if not torch.isfinite(value):
            sick = [
                who
                for who, tensors in (("the student", student), ("the teacher", teacher))
                if not all(torch.isfinite(t).all() for t in tensors)
            ]
            why = f": what {sick[0]} gives there is not finite" if sick else ""
            raise PluginError(
                f"{self.plugin} is {value.item()} on the first batch at {self.where}{why}"
            )
        learning = [t for t in student if t.requires_grad]
        if not learning:
            say(
                f"{self.name} trains nothing of the student as yet: what it compares depends on no "
                "weight that is trained"
            )
            return
        gradients = torch.autograd.grad(value, learning, retain_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise PluginError(f"{self.plugin} returned a loss without gradient to the student")

    def prepare(self, n: int, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> None:
        """Make the parameters of a loss, the same in every process and run."""
        loss = self.losses[n]
        sides: tuple[Any, Any] = (
            tuple(t.detach() for t in student),
            tuple(t.detach() for t in teacher),
        )
        if loss.places == 1:
            sides = sides[0][0], sides[1][0]
        device = student[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(n)
            loss.prepare(*sides)
        loss.to(device).train()
        self.shapes[n] = (_shapes(student), _shapes(teacher))
        learns = next((name for name, _ in loss.named_parameters()), None)
        if learns is not None and self.both_ways:
            raise SlimkitError(
                f"distill: loss {self.entry.name!r} learns {learns}, which works one way only: "
                "with a teacher that learns, choose losses without parameters, such as kl"
            )

    def narrow(self, n: int, cuts: Mapping[str, tuple[int, list[int]]]) -> None:
        """Remember that the student's channels became fewer: place to (dimension, positions)."""
        shapes = self.shapes[n]
        assert shapes is not None
        student = [list(shape) for shape in shapes[0]]
        for shape, place in zip(student, self.places, strict=True):
            if place.text in cuts:
                dim, positions = cuts[place.text]
                shape[dim] = len(positions)
        self.shapes[n] = (tuple(tuple(shape) for shape in student), shapes[1])

    def state(self) -> list[tuple[Any, dict[str, Tensor]]]:
        """Shapes and parameters for each teacher."""
        return [
            (shapes, loss.state_dict())
            for shapes, loss in zip(self.shapes, self.losses, strict=True)
        ]

    def load(self, state: list[tuple[Any, dict[str, Tensor]]]) -> None:
        """Make parameters of the saved shapes and take the saved values."""
        for n, (shapes, weights) in enumerate(state):
            if shapes is None:
                continue
            sides = [tuple(torch.zeros(shape) for shape in side) for side in shapes]
            with blame(self.plugin, "going on from a checkpoint"):
                self.prepare(n, *sides)
                self.losses[n].load_state_dict(weights)


def _shapes(tensors: tuple[Tensor, ...]) -> Shapes:
    return tuple(tuple(t.shape) for t in tensors)


def each_loss(distillation: Distillation) -> Iterator[tuple[Comparison, int, DistillationLoss]]:
    """Every loss that has been prepared, with the number of its teacher."""
    for comparison in distillation.comparisons:
        for n, loss in enumerate(comparison.losses):
            if comparison.shapes[n] is not None:
                yield comparison, n, loss
