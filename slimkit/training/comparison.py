"""One loss of a recipe between the student and its teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.batches import labels_of
from slimkit.errors import PluginError, SlimkitError
from slimkit.interfaces import DistillationLoss
from slimkit.places import Place
from slimkit.pruning.removal import Kept
from slimkit.recipe import Loss
from slimkit.registry import Listed, blame, discover
from slimkit.training.catching import Catch
from slimkit.training.cut_features import Cuts
from slimkit.training.teachers import Average, Teacher

Say = Callable[[str], None]
Shapes = tuple[tuple[int, ...], ...]
Sides = tuple[Shapes, Shapes]


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
        self.shapes: list[Sides | None] = [None] * teachers
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

    def tensors_in(self, caught: Catch) -> tuple[Tensor, ...]:
        """The student's tensors of each place.

        Raises:
            SlimkitError: a place gives no single tensor.
        """
        try:
            return tuple(caught.tensor(place) for place in self.places)
        except SlimkitError as error:
            raise SlimkitError(f"distill: loss {self.entry.name!r}: {error}") from error

    def taken_from(self, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """A teacher's tensors of each place."""
        return tuple(given[text] for text in self.entry.sides[1])

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
        if loss.compares_samples and len(student[0]) == 1 and self.shapes[max(n, 0)] is not None:
            nothing = [t.reshape(-1)[:0].sum() for t in student]  # whatever is in them
            return torch.stack(nothing).sum()  # the last batch of an epoch
        with blame(self.plugin, f"comparing student and {who} at {self.where}"):
            try:
                if n >= 0 and self.shapes[n] is None:
                    self.prepare(n, student, teacher)
                value = loss(*sides, **more)
            except ValueError as error:  # as its contract has it
                raise PluginError(
                    f"distill: {self.plugin} cannot compare student and {who} at {self.where}: "
                    f"{error}"
                ) from error
        if not isinstance(value, Tensor) or value.dim() != 0:
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise PluginError(f"{self.plugin} must return a scalar tensor, not {what}")
        if not value.requires_grad and any(t.requires_grad for t in student):
            raise PluginError(f"{self.plugin} returned a loss without gradient to the student")
        return value

    def look_at(
        self,
        value: Tensor,
        student: tuple[Tensor, ...],
        teacher: tuple[Tensor, ...],
        network: nn.Module,
        say: Say,
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
            here = (network.get_submodule(place.module) for place in self.places)
            if any(p.requires_grad for part in here for p in part.parameters()):
                why = (
                    "it is computed under torch.no_grad(), or in a checkpoint with "
                    "use_reentrant=True (write use_reentrant=False)"
                )
            else:
                why = "what it compares depends on no weight that is trained"
            say(f"{self.name} trains nothing of the student as yet: {why}")
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

    def cuts_of(self, n: int, cuts: Cuts, teacher: Teacher) -> tuple[Sides, Kept]:
        """What a cut leaves of the shapes that are compared, and of the parameters over channels.

        Args:
            n: number of the loss.
            cuts: where the student has fewer channels.
            teacher: an average of the student has as many as the student.
        """
        shapes = self.shapes[n]
        assert shapes is not None
        student = [place.text for place in self.places]
        sides = (_narrowed(shapes[0], student, cuts), shapes[1])
        kept = _kept(self.losses[n].student_channels, cuts.get(student[0]))
        if isinstance(teacher, Average):
            theirs = [*self.entry.sides[1]]
            sides = (sides[0], _narrowed(shapes[1], theirs, cuts))
            for name, dims in _kept(self.losses[n].teacher_channels, cuts.get(theirs[0])).items():
                kept.setdefault(name, {}).update(dims)
        return sides, kept

    def state(self) -> list[tuple[Any, dict[str, Tensor]]]:
        """Shapes and parameters for each teacher."""
        return [
            (shapes, loss.state_dict())
            for shapes, loss in zip(self.shapes, self.losses, strict=True)
        ]

    def load(self, state: list[tuple[Any, dict[str, Tensor]]]) -> None:
        """Make parameters of the saved shapes and take the saved values."""
        for n, (shapes, weights) in enumerate(state):
            if shapes is None:  # from before the first batch
                self.shapes[n] = None
                continue
            sides = [tuple(torch.zeros(shape) for shape in side) for side in shapes]
            with blame(self.plugin, "going on from a checkpoint"):
                self.prepare(n, *sides)
                self.losses[n].load_state_dict(weights)


def _narrowed(shapes: Shapes, places: Sequence[str], cuts: Cuts) -> Shapes:
    found = [list(shape) for shape in shapes]
    for shape, place in zip(found, places, strict=True):
        if place in cuts:
            dim, positions = cuts[place]
            shape[dim] = len(positions)
    return tuple(tuple(shape) for shape in found)


def _kept(parameters: Mapping[str, int], cut: tuple[int, list[int]] | None) -> Kept:
    return {} if cut is None else {name: {dim: cut[1]} for name, dim in parameters.items()}


def _shapes(tensors: tuple[Tensor, ...]) -> Shapes:
    return tuple(tuple(t.shape) for t in tensors)
