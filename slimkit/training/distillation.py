"""What the student learns from its teachers, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from slimkit.batches import labels_of
from slimkit.errors import SlimkitError
from slimkit.interfaces import DistillationLoss
from slimkit.places import Place
from slimkit.recipe import Distill, Loss, Optimizer
from slimkit.training.catching import Catch, catching, module_paths
from slimkit.training.comparison import Comparison
from slimkit.training.confidence import confidence, mixed
from slimkit.training.entering import Entry
from slimkit.training.loss_weights import weight_at
from slimkit.training.teacher_building import teachers_of
from slimkit.training.teacher_cache import Given
from slimkit.training.teachers import Average, Peer

Say = Callable[[str], None]


class Distillation:
    """Compares student and teachers at the places that the recipe names.

    The student's tensors are caught by forward hooks during its own training step, so any
    LightningModule works; teachers then run on the same inputs. What it owns (parameters of losses,
    an average of the student, peers) is in no state dict: `state` gives it for the checkpoint.

    Args:
        entry: to the network being trained, as it is before anything is compressed.
        recipe: the distill section.
        optimizer: for a peer that is a plain module.
        say: told of what is skipped, with one line.

    Raises:
        SlimkitError: a place, plugin or teacher is not there or cannot be used as the recipe does.
    """

    def __init__(
        self,
        entry: Entry,
        recipe: Distill,
        optimizer: Optimizer | None = None,
        say: Say = lambda _line: None,
    ) -> None:
        self.entry = entry
        self.student = student = entry.network
        self.recipe = recipe
        self.say = say
        self.teachers = teachers_of(recipe, entry, optimizer or Optimizer())
        self.comparisons: list[Comparison] = []
        modules = module_paths(student)
        for loss in recipe.losses:
            self.comparisons.append(self._comparison(loss, modules))
        self._name_apart()
        self._device: torch.device | None = None
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
        inputs: tuple[Any, ...] | None = None,
    ) -> dict[str, Tensor]:
        """Each loss, weighted: name to scalar; and what peers learn, under their names.

        Args:
            caught: of the student's forward on the batch.
            batch: gives labels.
            batch_idx: its number in the epoch, for the step of peers.
            now: fraction of the training that has passed.
            trainer: for the step of peers.
            inputs: of the network, where the training step went round its forward.

        Raises:
            PluginError: a loss fails or is no scalar; or, on the first batch, not finite or
                without a gradient to the student.
            SlimkitError: a place gives no single tensor.
        """
        if not caught.called:  # the training step went round the forward: run it once more
            with self.watching() as caught:
                self.student(*(self.entry(batch) if inputs is None else inputs))
        mine = [comparison.tensors_in(caught) for comparison in self.comparisons]
        parameter = next(self.student.parameters(), None)
        here = torch.zeros(()) if parameter is None else parameter
        self.move_to(here.device, here.dtype)
        given = [
            teacher.step(batch, batch_idx, trainer)
            if isinstance(teacher, Peer)
            else teacher.look(caught.args, caught.kwargs, self.say)
            for teacher in self.teachers
        ]
        result = self._from_teachers(given, mine, batch, now)
        for teacher, tensors in zip(self.teachers, given, strict=True):
            if isinstance(teacher, Peer):
                for name, value in self._of_peer(teacher, tensors, mine, batch, now).items():
                    result[name] = result.get(name, 0.0) + value
        self.tried = True
        return result

    def _from_teachers(
        self, given: list[Given], mine: list[tuple[Tensor, ...]], batch: Any, now: float
    ) -> dict[str, Tensor]:
        """What the student learns, of the teachers by their shares or of their mixture."""
        taught = [{place: t.detach() for place, t in g.items()} for g in given]
        whos = [teacher.who for teacher in self.teachers]
        shares = [teacher.share for teacher in self.teachers]
        if self.recipe.weighting == "confidence":
            first = self.recipe.losses[0].sides[1][0]
            sure = confidence(taught, first, labels_of(batch), shares)
            taught, whos, shares = [mixed(taught, sure)], ["the teachers"], [1.0]
        result: dict[str, Tensor] = {}
        for comparison, student in zip(self.comparisons, mine, strict=True):
            values = []
            for n, tensors in enumerate(taught):
                theirs = comparison.taken_from(tensors)
                value = comparison.value(n, student, theirs, batch, whos[n])
                if not self.tried:
                    comparison.look_at(value, student, theirs, self.student, self.say)
                values.append(value if len(shares) == 1 else shares[n] / sum(shares) * value)
            weight = weight_at(comparison.entry.weight, now)
            result[comparison.name] = weight * sum(values[1:], values[0])
        return result

    def _of_peer(
        self, peer: Peer, given: Given, mine: list[tuple[Tensor, ...]], batch: Any, now: float
    ) -> dict[str, Tensor]:
        """What a peer learns of the labels and of the student."""
        label_weight = weight_at(self.recipe.label_weight, now)
        result = {f"{peer.name}/labels": label_weight * peer.label_loss}
        for comparison, student in zip(self.comparisons, mine, strict=True):
            weight = weight_at(comparison.entry.weight, now)
            fixed = tuple(t.detach() for t in student)
            value = comparison.value(-1, comparison.taken_from(given), fixed, batch, "student")
            result[f"{peer.name}/{comparison.name}"] = weight * value
        return result

    def move_to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Take teachers and losses to where the student is; parameters stay the same objects.

        Args:
            device: of the student.
            dtype: of its parameters, for teachers, which are shown the same inputs.
        """
        for teacher in self.teachers:
            teacher.move_to(device, dtype)
        if device != self._device:
            self._device = device
            for comparison in self.comparisons:
                for loss in comparison.losses:
                    loss.to(device)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What losses learn, by a name of its own; empty before the first batch."""
        return {
            f"{comparison.name}.{n}.{name}": parameter
            for comparison in self.comparisons
            for n, loss in enumerate(comparison.losses)
            if comparison.shapes[n] is not None
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
        self._device = None  # what was made now is on the CPU
        for average, (weights, steps) in zip(self.averages, state["averages"], strict=True):
            average.network.load_state_dict(weights)
            average.steps = steps
        for peer, weights in zip(self.peers, state["peers"], strict=True):
            peer.module.load_state_dict(weights)


def each_loss(distillation: Distillation) -> Iterator[tuple[Comparison, int, DistillationLoss]]:
    """Every loss that has been prepared, with the number of its teacher."""
    for comparison in distillation.comparisons:
        for n, loss in enumerate(comparison.losses):
            if comparison.shapes[n] is not None:
                yield comparison, n, loss
