"""The callback that lets losses, peers and averages live through a training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from slimkit.errors import SlimkitError
from slimkit.places import Place
from slimkit.pruning.removal import Attributes, Kept, fitted, kept_positions, remove_
from slimkit.training.comparison import Comparison, Shapes, Sides
from slimkit.training.cut_features import Cuts, features, kept_channels, since
from slimkit.training.distillation import Distillation, each_loss
from slimkit.training.optimizers import add_group_, optimizer_of, shrink_optimizers_
from slimkit.training.pruning import ChannelPruning
from slimkit.training.ranks import average_gradients_, several, share_
from slimkit.training.teachers import Average, Teacher

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


class DistillationCallback(pl.Callback):
    """Puts what losses and peers learn into the first optimizer, and keeps it in step.

    When the student's channels are cut, parameters of losses over these channels are cut to the
    same ones with their optimizer state; where these cannot be told, they begin anew.

    Args:
        module: owns the network.
        distillation: its own.
    """

    def __init__(self, module: SlimModule, distillation: Distillation) -> None:
        self.module = module
        self.distillation = distillation
        self._steps = 0
        self._checked = False
        self._followed: object = None  # the report of the cut that losses are in step with

    def on_fit_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Give peers, and losses of a resumed run, their place before the optimizer's is restored.

        Raises:
            SlimkitError: there is no optimizer to train peers.
        """
        self.distillation.move_to(self.module.device)
        peers = self.distillation.peer_parameters()
        if peers and several():
            share_(peers.values())
        self._train_all(trainer)

    def on_train_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Begin, also where a search for a learning rate has made other optimizers meanwhile."""
        self._steps = trainer.global_step
        self._checked = False
        self.distillation.move_to(self.module.device)
        self._train_all(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, _module: pl.LightningModule, *_rest: Any
    ) -> None:
        """Follow a cut, which comes before this callback's turn."""
        self._follow(trainer)

    def on_before_backward(
        self, trainer: pl.Trainer, _module: pl.LightningModule, _loss: Tensor
    ) -> None:
        """At the first batch, refuse what pruning would break; train what losses have made."""
        if not self._checked and self.distillation.tried:  # steps by hand may begin with others
            self._checked = True
            self._check_survival(trainer)
            self._train_all(trainer)

    def on_after_backward(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Average over processes the gradients that DDP does not know."""
        if several():
            average_gradients_(self.distillation.parameters().values())
            average_gradients_(self.distillation.peer_parameters().values())

    def on_train_batch_end(
        self, trainer: pl.Trainer, _module: pl.LightningModule, *_rest: Any
    ) -> None:
        """Let averages follow an optimizer step."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            for average in self.distillation.averages:
                average.follow(self.module.network)
                if several():  # batch-norm has statistics of its own in each process
                    share_(average.network.buffers())

    def on_train_epoch_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Say once where the cache is of no use."""
        if trainer.current_epoch != 1:
            return
        for teacher in self.distillation.teachers:
            if teacher.cache is not None and teacher.cache.is_useless:
                self.module.say(
                    f"nothing that {teacher.who} was shown came again: its cache is of use only "
                    "where inputs are the same in each epoch (no augmentation), or in another run "
                    "of the same seed"
                )

    def on_train_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Follow a cut at the very end, for the last checkpoint."""
        self._follow(trainer)

    def _train_all(self, trainer: pl.Trainer) -> None:
        """Put what learns into the optimizer, unless it is there."""
        self._train(trainer, self.distillation.peer_parameters(), "teachers that learn")
        self._train(trainer, self.distillation.parameters(), "losses that learn")

    def _train(
        self, trainer: pl.Trainer, parameters: Mapping[str, nn.Parameter], what: str
    ) -> None:
        if not parameters:
            return
        if not trainer.optimizers:
            raise SlimkitError(
                f"distill: {what} need an optimizer, but configure_optimizers gave none"
            )
        optimizer = optimizer_of(trainer.optimizers, self.module.network)
        add_group_(
            optimizer,
            parameters,
            [config.scheduler for config in trainer.lr_scheduler_configs],
            weight_decay=optimizer.param_groups[0].get("weight_decay", 0.0),
            what=what,
            way_out="choose others, such as kl with the dense teacher",
            place=self.module.places.get(what),
        )

    def _follow(self, trainer: pl.Trainer) -> None:
        """Cut parameters over channels to what a cut of the student left."""
        report = getattr(self.module.network, "slimkit_pruning", None)
        if report is None or report is self._followed:
            return
        self._followed = report
        learning = [
            (comparison, n)
            for comparison, n, loss in each_loss(self.distillation)
            if loss.student_channels or loss.teacher_channels
        ]
        if not learning or not report.kept:
            return
        before = getattr(self.module.dense, "slimkit_pruning", None)
        kept = since({} if before is None else before.kept, report.kept)
        for comparison, n in learning:
            try:
                cuts = self._cuts(kept, report.attributes, [comparison])
            except Exception as error:  # a model may refuse random weights or inputs
                self.module.say(f"{comparison.name} begins anew after the cut: {error}")
                self._begin_anew(comparison, n, trainer.optimizers)
            else:
                self._cut(comparison, n, cuts, trainer.optimizers)

    def _cut(
        self,
        comparison: Comparison,
        n: int,
        cuts: Cuts,
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        """Leave what is over the channels that are left, in the loss and in the optimizers."""
        loss = comparison.losses[n]
        sides, kept = comparison.cuts_of(n, cuts, self._teacher(n))
        shapes = {name: tuple(p.shape) for name, p in loss.named_parameters()}
        if sides == comparison.shapes[n]:
            return  # nothing is cut there, or the checkpoint is from behind the cut
        remove_(loss, kept)
        shrink_optimizers_(optimizers, loss, kept, shapes)
        comparison.shapes[n] = sides

    def _begin_anew(
        self, comparison: Comparison, n: int, optimizers: Iterable[torch.optim.Optimizer]
    ) -> None:
        """Make the parameters again for features of the cut network, in the old ones' groups."""
        before = dict(comparison.losses[n].named_parameters())
        shapes = comparison.shapes[n]
        assert shapes is not None
        device = next(iter(before.values())).device
        inputs = self.module.state.example_inputs
        sides = [_like(shapes[0], comparison.places, self.module.network, inputs, device)]
        teacher = self._teacher(n)
        if isinstance(teacher, Average):
            places = [teacher.places[text] for text in comparison.entry.sides[1]]
            sides.append(_like(shapes[1], places, teacher.network, inputs, device))
        else:
            sides.append(tuple(torch.zeros(shape, device=device) for shape in shapes[1]))
        comparison.prepare(n, *sides)
        after = dict(comparison.losses[n].named_parameters())
        renewed = {id(old): after[name] for name, old in before.items()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [renewed.get(id(p), p) for p in group["params"]]
            for old in before.values():
                optimizer.state.pop(old, None)

    def _teacher(self, n: int) -> Teacher:
        """Whose tensors the n-th loss of a comparison sees; of a mixture, the first's."""
        return self.distillation.teachers[n]

    def _cuts(self, kept: Kept, attributes: Attributes, wanted: Iterable[Comparison]) -> Cuts:
        places = {place.text: place for comparison in wanted for place in comparison.places}
        for average in self.distillation.averages:  # of the student's structure
            places |= average.places
        inputs = self.module.state.example_inputs
        return kept_channels(self.module.dense, kept, attributes, [*places.values()], inputs)

    def _check_survival(self, trainer: pl.Trainer) -> None:
        """Try each loss on features with half of the channels that pruning may take.

        Raises:
            SlimkitError: one cannot compare them with the teacher's any more.
        """
        pruning = next((c for c in _callbacks(trainer) if isinstance(c, ChannelPruning)), None)
        if pruning is None or self.module.state.cut or not self.module.state.example_inputs:
            return
        compared = self.distillation.comparisons
        if pruning.selector is None or not any(p.module for c in compared for p in c.places):
            return
        groups = pruning.selector.prunable(pruning.target)
        pairs = [(g, torch.arange(max(1, g.channels // 2))) for g in groups]
        try:
            cuts = self._cuts(kept_positions(pairs), fitted(pairs), compared)
        except Exception:  # half of everything may be more than the network bears: nothing is known
            return
        for comparison, n, _ in each_loss(self.distillation):
            sides, kept = comparison.cuts_of(n, cuts, self._teacher(n))
            if sides != comparison.shapes[n]:
                _try(comparison, n, sides, kept)
        if self.distillation.recipe.weighting == "confidence" and self.distillation.averages:
            averaged = [p for a in self.distillation.averages for p in a.places if p in cuts]
            if averaged and len(self.distillation.averages) < len(self.distillation.teachers):
                raise SlimkitError(
                    f"distill.weighting: confidence averages what the teachers give, but at "
                    f"{averaged[0]!r} pruning changes the channels of ema only: protect that layer "
                    "from pruning, or leave 'weighting' out"
                )


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]  # set elsewhere


def _like(
    shapes: Shapes,
    places: Iterable[Place],
    network: nn.Module,
    inputs: tuple[Any, ...],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Zeros of the batch sizes of `shapes`, and beyond of what the network gives now."""
    places = [*places]
    given = features(network, places, inputs)
    return tuple(
        torch.zeros((shape[0], *given[place.text].shape[1:]), device=device)
        for shape, place in zip(shapes, places, strict=True)
    )


def _try(comparison: Comparison, n: int, sides: Sides, kept: Kept) -> None:
    """Compute a copy of a loss on tensors of these shapes, its parameters cut to `kept`."""
    loss = copy.deepcopy(comparison.losses[n]).cpu()
    labels = torch.zeros(sides[0][0][0], dtype=torch.int64)
    more = {"labels": labels} if "labels" in loss.needs else {}
    student, teacher = ([torch.ones(shape) for shape in side] for side in sides)
    try:
        remove_(loss, kept)
        with torch.no_grad():
            if loss.places > 1:
                loss(tuple(student), tuple(teacher), **more)
            else:
                loss(student[0], teacher[0], **more)
    except Exception as error:  # whatever a plugin raises where shapes do not fit
        tried = ", ".join(str(tuple(x.shape)) for x in student)
        raise SlimkitError(
            f"distill: loss {comparison.entry.name!r} at {comparison.where} could not be computed "
            f"once channels are pruned there (tried with {tried}): {error}"
        ) from error
