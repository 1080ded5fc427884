"""When a recipe's window prunes: the timeline that channels and single weights share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimkit.batches import first_sample, samples_in
from slimkit.batchnorm import reestimate_
from slimkit.errors import PruningError, SlimkitError
from slimkit.interfaces import Criterion
from slimkit.pruning.masks import Masks
from slimkit.pruning.scores import GRADIENTS, without_gradient
from slimkit.pruning.sparsity import WeightMasks
from slimkit.pruning.statistics import MEASURED, Measured, measure
from slimkit.recipe import Prune
from slimkit.registry import discover
from slimkit.training.averages import averages_of
from slimkit.training.optimizers import held_by
from slimkit.training.ranks import average_, averaged, check_alike, of_the_first, several, sum_
from slimkit.training.strategies import check_strategy
from slimkit.training.timeline import moment, progress

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


class PruningCallback(pl.Callback, ABC):
    """Masks more and more of a `SlimModule`'s network during the window, then makes it final.

    Args:
        module: owns the network and remembers what was done.
        recipe: the prune section.
    """

    lasting: ClassVar[bool]
    """Whether what is masked stays in the network, and is masked until the training ends."""

    def __init__(self, module: SlimModule, recipe: Prune) -> None:
        self.module = module
        self.recipe = recipe
        self.criterion: Criterion = discover().create(
            "criterion", recipe.criterion.name, recipe.criterion.options
        )
        self.masks: Masks | WeightMasks | None = None
        self._window = (0.0, 1.0)
        self._averages: list[nn.Module] | None = None
        self._batch_idx = 0
        self._collected = False  # whether the batch's gradients are in the scores
        self._samples = 1  # of the batch
        self._scores: dict[str, Tensor] = {}
        self._reached: set[str] = set()  # scored tensors that some loss has given a gradient
        self._is_told = True  # whether these are all
        self._recent: deque[Any] = deque(maxlen=recipe.data_batches)  # what a forward measures
        self._measured: dict[str, Measured] | None = None
        self._settling: dict[_BatchNorm, float | None] = {}
        self._settle_left = 0

    @abstractmethod
    def _analyse(self) -> None:
        """Find what may go, and set the masks to what has gone already."""

    @abstractmethod
    def _score(
        self, measured: Mapping[str, Measured] | None, fisher: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """What the criterion says of the present weights and gradients."""

    @abstractmethod
    def _scored(self) -> list[str]:
        """Paths of the tensors that the criterion scores."""

    def _scored_together(self) -> list[list[str]]:
        """The same, with those together of which one is enough."""
        return [[name] for name in self._scored()]

    @abstractmethod
    def _update(self, due: int) -> None:
        """Take the schedule's step number `due`, forget the scores, and tell what was done."""

    @abstractmethod
    def _finish(self, trainer: pl.Trainer) -> None:
        """Make final what the masks say."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {
            "scores": self._scores,
            "reached": sorted(self._reached),
            "settle_left": self._settle_left,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scores collected and the batch-norm batches left."""
        self._scores, self._settle_left = state_dict["scores"], state_dict["settle_left"]
        self._reached = set(state_dict.get("reached", self._scores))
        self._is_told = "reached" in state_dict  # else another version wrote it

    def on_train_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Place the window; go on settling batch-norm where the run was resumed in its middle."""
        check_strategy(
            trainer, "pruning while training", "prune with max_epochs: 0 first and train the result"
        )
        self._window = self._placed(trainer)
        if self._settle_left and not self._settling:
            self._start_settling()

    def on_train_epoch_start(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Forget the batches of the epoch before, which a resumed run has not seen."""
        self._recent.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, _module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Analyse at the first batch; finish when the window has closed."""
        self._batch_idx, self._collected, self._samples = batch_idx, False, samples_in(batch)
        state = self.module.state
        if self.masks is None and (self.lasting or not state.cut):
            inputs = first_sample(self.module.entry.tried(batch))
            state.example_inputs = of_the_first(inputs, self._device) if several() else inputs
            self._analyse()
            self._check_gradients()
        if not state.cut and self.criterion.needs & MEASURED:
            self._recent.append(batch)
        if not state.cut and state.updates >= self._updates:
            self._make_final(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, _module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Score by the gradients before a step by hand, which may throw them away at once."""
        if self.module.automatic_optimization or self.masks is None or self.module.state.cut:
            return
        if not self.needs_gradient or progress(trainer, self._batch_idx + 1) < self._window[0]:
            return
        named = dict(self.module.network.named_parameters(remove_duplicate=False))
        mine = {id(named[name]) for name in self._scored() if name in named}
        if not mine.isdisjoint(held_by([optimizer])):
            self._collect_scores()
            self._collected = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        _module: pl.LightningModule,
        _outputs: Any,
        _batch: Any,
        batch_idx: int,
    ) -> None:
        """Collect scores, take the next step of the schedule, keep dead channels dead."""
        self._settle()
        state = self.module.state
        if self.masks is None:
            return
        if not state.cut:
            self._step(progress(trainer, batch_idx + 1))
        self._apply(trainer)

    def on_train_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Finish at the latest when training ends."""
        self.conclude(trainer)

    def on_fit_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Finish where a run went on from a checkpoint of its very end, and no batch was left."""
        self.conclude(trainer)

    def conclude(self, trainer: pl.Trainer) -> None:
        """Finish now if that has not happened."""
        state = self.module.state
        if not state.cut and state.example_inputs:
            if self.masks is None:
                self._analyse()
            if state.updates < self._updates:
                if not self._scores:
                    if not self._recent:
                        few = islice(trainer.train_dataloader or (), self.recipe.data_batches)
                        self._recent.extend(few)
                    self._collect_scores()
                self._take(self._updates)
            self._make_final(trainer)
            self._finish_settling()
            batches = trainer.train_dataloader or ()
            network = self.module.network
            used = reestimate_(network, batches, self.recipe.batchnorm_batches, self.module.entry)
            if used and several():
                norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
                average_(b for norm in norms for b in norm.buffers() if b.is_floating_point())
        self._finish_settling()

    @property
    def _updates(self) -> int:
        return 1 if self.recipe.schedule == "one-shot" else self.recipe.steps

    @property
    def needs_gradient(self) -> bool:
        """Whether scores are collected from the gradients of each batch."""
        return bool(self.criterion.needs & GRADIENTS)

    def _check_gradients(self) -> None:
        """Refuse, in front of the first step, a criterion of gradients that frozen weights lack.

        Raises:
            PruningError: there are such weights.
        """
        if not self.needs_gradient or self.module.state.cut:
            return
        named = dict(self.module.network.named_parameters(remove_duplicate=False))
        scored = [name for name in self._scored() if name in named and named[name].dim() > 1]
        frozen = [name for name in scored if not named[name].requires_grad]
        if frozen:
            listed = ", ".join(frozen[:4]) + (" ..." if len(frozen) > 4 else "")
            raise PruningError(
                f"criterion {self.recipe.criterion.name!r} needs gradients, but {listed} "
                f"{'is' if len(frozen) == 1 else 'are'} frozen (requires_grad=False): unfreeze, "
                "keep with prune.protect, or choose a criterion without gradients such as 'l1'"
            )

    def _refuse_unreached(self) -> None:
        """Refuse a criterion of gradients where no batch has given some weights any.

        Raises:
            PruningError: there are such weights.
        """
        if not self.needs_gradient or not self._is_told:
            return
        named = dict(self.module.network.named_parameters(remove_duplicate=False))
        for together in self._scored_together():
            own = [name for name in together if name in named and named[name].dim() > 1]
            if own and self._reached.isdisjoint(own):
                raise without_gradient(own[0], self.criterion)

    def _collect_scores(self) -> None:
        """Add the scores of the present weights and gradients to those since the last update.

        A weight that this batch's loss does not depend on (a head of another task) has a gradient
        of zero; a batch that the training step left out says nothing.
        """
        with self._gradients() as there:
            if there:
                for name, score in self._scores_now().items():
                    known = self._scores.get(name)
                    self._scores[name] = score if known is None else known + score

    @contextmanager
    def _gradients(self) -> Iterator[bool]:
        """Inside, what is scored has gradients; false where it has none, though it should."""
        if not self.needs_gradient:
            yield True
            return
        named = dict(self.module.network.named_parameters(remove_duplicate=False))
        scored = {name: named[name] for name in self._scored() if name in named}
        reached = {name for name, p in scored.items() if p.grad is not None}
        self._reached |= reached
        absent = [p for name, p in scored.items() if name not in reached and reached]
        for parameter in absent:
            parameter.grad = torch.zeros_like(parameter)
        try:
            yield bool(reached)
        finally:
            for parameter in absent:
                parameter.grad = None

    def _scores_now(self) -> dict[str, Tensor]:
        """The scores of the present weights and gradients.

        Activations are those of the epoch's last `data_batches` batches. The Fisher information is
        estimated by the squared gradient of a batch's mean loss times its samples.
        """
        network, needs = self.module.network, self.criterion.needs
        squares = None
        if "fisher" in needs:
            named = network.named_parameters(remove_duplicate=False)
            squares = {n: self._samples * p.grad.square() for n, p in named if p.grad is not None}
        if needs & MEASURED and self._measured is None:
            self._measured = measure(network, self._recent, len(self._recent), self.module.entry)
            if several():
                _pool_(self._measured.values())
        return self._score(self._measured, squares)

    def _step(self, now: float) -> None:
        """Collect scores and take the steps of the schedule that are due at `now`, 0 to 1."""
        begin, end = self._window
        if now < begin:
            return
        if self.needs_gradient and not self._collected and self.module.automatic_optimization:
            self._collect_scores()
        window = max(end - begin, 1e-9)
        due = min(self._updates, math.floor((now - begin) / window * self._updates + 1e-9))
        if end == begin or now >= end:
            due = self._updates
        if due > self.module.state.updates:
            if not self.needs_gradient:
                self._collect_scores()
            if not self._scores:
                return  # no step of this network's optimizer yet
            self._take(due)

    def _take(self, due: int) -> None:
        """Take the schedule's step number `due` by the scores of all processes, and alike in all.

        Raises:
            PruningError: a process keeps other channels or weights than the first.
        """
        if several():
            self._scores = averaged(self._scores, self._device)
        self._refuse_unreached()
        if not self._scores:
            raise without_gradient(self._scored()[0], self.criterion)
        self._update(due)
        if several():
            check_alike(self.module.state.living, "choice of what stays", PruningError)

    @property
    def _device(self) -> torch.device:
        """Where this process computes."""
        return self.module.trainer.strategy.root_device

    def _apply(self, trainer: pl.Trainer) -> None:
        """Zero what is dead, in the network and in its averages."""
        assert self.masks is not None
        for network in (self.module.network, *self._averaged(trainer)):
            self.masks.apply_(network)

    def _make_final(self, trainer: pl.Trainer) -> None:
        """Finish, and settle batch-norm over the next batches."""
        self._finish(trainer)
        self.module.state.cut = True
        if not self.lasting:
            self.masks = None
        if self.recipe.batchnorm_batches:
            self._settle_left = self.recipe.batchnorm_batches
            self._start_settling()
            for norm in self._settling:
                if norm.training:  # what the user keeps in evaluation mode never fills up again
                    norm.reset_running_stats()

    def _placed(self, trainer: pl.Trainer) -> tuple[float, float]:
        """Begin and end of the window as fractions of the training.

        Raises:
            SlimkitError: it ends after the training, or after rounding has begun.
        """
        first, last = self.recipe.during
        try:
            begin, end = moment(trainer, first), moment(trainer, last)
        except SlimkitError as error:
            raise SlimkitError(f"prune.during: {error}") from error
        if begin > end:
            raise SlimkitError(
                f"prune.during: should begin before it ends, but {first} is "
                f"{begin:.1%} of this training and {last} is {end:.1%}"
            )
        quantize = self.module.recipe.quantize
        rounding = None if quantize is None else quantize.train_from
        if rounding is not None and rounding < end - 1e-9:
            raise SlimkitError(
                f"quantize.train_from: should not be before the end of prune.during, step {last} "
                f"or {end:.4g} of this training, but is {rounding}"
            )
        return begin, end

    def _averaged(self, trainer: pl.Trainer) -> list[nn.Module]:
        if self._averages is None:
            self._averages = averages_of(self.module, trainer)
        return self._averages

    def _start_settling(self) -> None:
        """Let batch-norm statistics be the plain average over the next batches."""
        norms = [m for m in self.module.network.modules() if isinstance(m, _BatchNorm)]
        self._settling = {m: m.momentum for m in norms if m.track_running_stats}
        for norm in self._settling:
            norm.momentum = None

    def _settle(self) -> None:
        if self._settle_left:
            self._settle_left -= 1
            if not self._settle_left:
                self._finish_settling()

    def _finish_settling(self) -> None:
        for norm, momentum in self._settling.items():
            norm.momentum = momentum
        self._settling, self._settle_left = {}, 0


def _pool_(measured: Iterable[Measured]) -> None:
    """Let what each process measured on its own batches be what all have, together."""
    found = list(measured)
    sums = [t for m in found for t in (m.squares, m.sizes, m.zeros) if t is not None]
    counts = torch.tensor([m.values for m in found], dtype=torch.float64, device=sums[0].device)
    sum_([*sums, counts])
    for one, count in zip(found, counts.tolist(), strict=True):
        one.values = round(count)
