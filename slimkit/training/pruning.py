"""The callback that prunes: masks grow during a window, then the channels are cut out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimkit.batches import first_sample, inputs_of
from slimkit.batchnorm import reestimate_
from slimkit.errors import PruningError, SlimkitError
from slimkit.interfaces import Criterion
from slimkit.pruning.cost import macs
from slimkit.pruning.coupling import Coupling
from slimkit.pruning.masks import Masks
from slimkit.pruning.prune import analyse, channel_multiple, cut_
from slimkit.pruning.regularizers import REGULARIZERS, Growing, Regularizer
from slimkit.pruning.removal import fitted, kept_positions, remove_, rescale_
from slimkit.pruning.schedules import amount
from slimkit.pruning.scores import group_scores
from slimkit.pruning.selection import Selector
from slimkit.pruning.targets import Target
from slimkit.recipe import Prune
from slimkit.registry import discover
from slimkit.training.averages import averages_of
from slimkit.training.following import log_pruning
from slimkit.training.optimizers import shrink_optimizers_
from slimkit.training.timeline import moment, progress

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


def target_of(recipe: Prune) -> Target | None:
    """How far a recipe prunes; None where only its ratios say so."""
    return None if recipe.target is None else Target(recipe.target.kind, recipe.target.value)


def coupling_of(network: nn.Module, inputs: tuple[Any, ...], recipe: Prune) -> Coupling:
    """The verified groups that a recipe lets go."""
    return analyse(network, inputs, recipe.protect, recipe.engine, recipe.attention)


def selector_of(
    network: nn.Module,
    coupling: Coupling,
    inputs: tuple[Any, ...],
    recipe: Prune,
    backends: Iterable[str],
) -> Selector:
    """What chooses the channels that a recipe's options, and the runtimes it exports to, leave.

    Raises:
        PruningError: an option does not fit the network.
    """
    return Selector(
        network,
        coupling,
        inputs,
        round_to=recipe.round_to,
        min_channels=recipe.min_channels,
        ranking=recipe.ranking,
        max_ratio=recipe.max_ratio,
        ratios=recipe.ratios,
        multiple=channel_multiple(backends),
        protect_first=recipe.protect_first,
    )


class PruningCallback(pl.Callback):
    """Prunes the network of a `SlimModule` on the recipe's timeline.

    Args:
        module: owns the network and remembers what was done.
        recipe: the prune section.
    """

    def __init__(self, module: SlimModule, recipe: Prune) -> None:
        self.module = module
        self.recipe = recipe
        self.target = target_of(recipe)
        self.criterion: Criterion = discover().create(
            "criterion", recipe.criterion.name, recipe.criterion.options
        )
        self.masks: Masks | None = None
        self.selector: Selector | None = None
        self.regularizer: Regularizer | None = None
        self._window = (0.0, 1.0)
        self._averages: list[nn.Module] | None = None
        self._batch_idx = 0
        self._collected = False  # whether the batch's gradients are in the scores
        self._chosen: dict[str, Tensor] = {}  # what a growing regularizer penalises
        self._scores: dict[str, Tensor] = {}
        self._settling: dict[_BatchNorm, float | None] = {}
        self._settle_left = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {
            "scores": self._scores,
            "settle_left": self._settle_left,
            "chosen": self._chosen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scores collected and the batch-norm batches left."""
        self._scores, self._settle_left = state_dict["scores"], state_dict["settle_left"]
        self._chosen = state_dict.get("chosen", {})

    def on_train_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Place the window; go on settling batch-norm where the run was resumed in its middle."""
        self._window = self._placed(trainer)
        if self._settle_left and not self._settling:
            self._start_settling()

    def on_train_batch_start(
        self, trainer: pl.Trainer, _module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Analyse at the first batch; cut when the window has closed."""
        self._batch_idx, self._collected = batch_idx, False
        state = self.module.state
        if not state.cut and self.masks is None:
            state.example_inputs = first_sample(inputs_of(batch, self.module.network))
            self._analyse()
        if not state.cut and state.updates >= self._updates:
            self._cut(trainer)

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        _module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Add the regularizer's gradient; criteria see the loss's alone where it can be told apart.

        Gradients are complete and unscaled here, and not clipped yet.
        """
        if self.regularizer is None or self.module.state.cut:
            return
        begin, end = self._window
        if progress(trainer, self._batch_idx + 1) >= begin:
            if "gradient" in self.criterion.needs and len(trainer.optimizers) == 1:
                self._collect_scores()
                self._collected = True
            if isinstance(self.regularizer, Growing):
                passed = (progress(trainer, self._batch_idx) - begin) / max(end - begin, 1e-9)
                steps = self.recipe.steps
                self._grow(self.regularizer, min(steps, math.floor(passed * steps) + 1) / steps)
        self.regularizer.add_([p for group in optimizer.param_groups for p in group["params"]])

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
        if state.cut or self.masks is None:
            return
        begin, end = self._window
        now = progress(trainer, batch_idx + 1)
        if now >= begin:
            needs_gradient = "gradient" in self.criterion.needs
            if needs_gradient and not self._collected:
                self._collect_scores()
            window = max(end - begin, 1e-9)
            due = min(self._updates, math.floor((now - begin) / window * self._updates + 1e-9))
            if end == begin or now >= end:
                due = self._updates
            if due > state.updates:
                if not needs_gradient:
                    self._collect_scores()
                self._update(due)
        for network in (self.module.network, *self._averaged(trainer)):
            self.masks.apply_(network)

    def on_train_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Cut at the latest when training ends."""
        self.conclude(trainer)

    def on_fit_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Cut where a run went on from a checkpoint of its very end, and no batch was left."""
        self.conclude(trainer)

    def conclude(self, trainer: pl.Trainer) -> None:
        """Cut now if that has not happened."""
        state = self.module.state
        if not state.cut and state.example_inputs:
            if self.masks is None:
                self._analyse()
            if state.updates < self._updates:
                if not self._scores:
                    self._collect_scores()
                self._update(self._updates)
            self._cut(trainer)
            self._finish_settling()
            batches = trainer.train_dataloader or ()
            reestimate_(self.module.network, batches, self.recipe.batchnorm_batches)
        self._finish_settling()

    @property
    def _updates(self) -> int:
        return 1 if self.recipe.schedule == "one-shot" else self.recipe.steps

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
        if quantize is not None and quantize.train_from is not None and quantize.train_from < end:
            raise SlimkitError(
                f"quantize.train_from: should not be before the end of prune.during, step {last} "
                f"or {end:.4g} of this training, but is {quantize.train_from}"
            )
        return begin, end

    def _averaged(self, trainer: pl.Trainer) -> list[nn.Module]:
        if self._averages is None:
            self._averages = averages_of(self.module, trainer)
        return self._averages

    def _analyse(self) -> None:
        network, inputs = self.module.network, self.module.state.example_inputs
        coupling = coupling_of(network, inputs, self.recipe)
        if not coupling.groups:
            raise PruningError(
                "nothing can be pruned: "
                + (
                    "; ".join(f"{n}: {r}" for n, r in list(coupling.frozen.items())[:8])
                    or "no group"
                )
            )
        self.masks = Masks(coupling, self.module.state.living)
        backends = [plugin.name for plugin in self.module.recipe.export]
        self.selector = selector_of(network, coupling, inputs, self.recipe, backends)
        # A target out of reach is said now, not after the window
        flat = {g.name: torch.ones(g.channels, dtype=torch.float64) for g in coupling.groups}
        self.selector.choose(flat, self.target)
        if self.recipe.regularizer is not None:
            groups, wanted = self.selector.prunable(self.target), self.recipe.regularizer
            self.regularizer = REGULARIZERS[wanted.name](network, groups, wanted.strength)
            left_out = [name for name, places in self.regularizer.places.items() if not places]
            if left_out:
                self.module.say(f"{wanted.name} finds nothing to penalise in {', '.join(left_out)}")
            if isinstance(self.regularizer, Growing):
                self.regularizer.chosen = self._chosen

    def _grow(self, regularizer: Growing, grown: float) -> None:
        """Choose what would go now, once, and let its penalty grow."""
        assert self.masks is not None
        assert self.selector is not None
        if not self._chosen:
            scores = self._scores or group_scores(
                self.module.network, self.masks.coupling, self.criterion
            )
            kept = self.selector.choose(
                self.masks.silence(scores), self.target, carried=self.module.state.carried
            ).kept
            groups = {g.name: torch.arange(g.channels) for g in self.masks.coupling.groups}
            self._chosen = {n: c[~torch.isin(c, kept[n])] for n, c in groups.items()}
            regularizer.chosen = self._chosen
        regularizer.grown = grown

    def _collect_scores(self) -> None:
        """Add the scores of the present weights and gradients to those since the last update."""
        assert self.masks is not None
        scores = group_scores(self.module.network, self.masks.coupling, self.criterion)
        for name, score in scores.items():
            self._scores[name] = self._scores.get(name, torch.zeros_like(score)) + score

    def _update(self, due: int) -> None:
        assert self.masks is not None
        assert self.selector is not None
        left = self.selector.left(self.target)
        share = amount(self.recipe.schedule, due / self._updates, left)
        scores = self.masks.silence(self._scores)
        state = self.module.state
        choice = self.selector.choose(scores, self.target, progress=share, carried=state.carried)
        self.masks.kept = choice.kept
        self._scores = {}
        state.updates = due
        state.living = {name: kept.clone() for name, kept in choice.kept.items()}
        state.carried = choice.carried
        state.macs_left = choice.macs / self.selector.dense_macs
        channels = {g.name: g.channels for g in self.masks.coupling.groups}
        dead = {name: 1 - len(kept) / channels[name] for name, kept in choice.kept.items()}
        log_pruning(self.module.trainer, self.module.network, dead, state.macs_left)
        total, living = sum(channels.values()), sum(map(len, choice.kept.values()))
        self.module.say(
            f"masked {total - living} of {total} channels, step {due} of {self._updates}: "
            f"{state.macs_left:.1%} of the MACs are left"
        )

    def _cut(self, trainer: pl.Trainer) -> None:
        """Remove the dead channels, from the optimizers too, and settle batch-norm."""
        assert self.masks is not None
        network, state = self.module.network, self.module.state
        named = network.named_parameters(remove_duplicate=False)
        shapes = {name: tuple(p.shape) for name, p in named}
        assert self.selector is not None
        pairs = [(group, self.masks.kept[group.name]) for group in self.masks.coupling.groups]
        for average in self._averaged(trainer):
            rescale_(average, pairs)
            remove_(average, kept_positions(pairs), fitted(pairs))
        report = cut_(
            network,
            self.masks.coupling,
            self.masks.kept,
            state.example_inputs,
            spared=self.selector.spared,
        )
        shrink_optimizers_(trainer.optimizers, network, report.kept, shapes)
        state.cut = True
        state.macs_left = macs(network, state.example_inputs) / report.macs[0]
        self.module.say(
            f"cut: {report.macs[1] / report.macs[0]:.1%} of the MACs and "
            f"{report.parameters[1] / report.parameters[0]:.1%} of the parameters are left"
        )
        if self.recipe.batchnorm_batches:
            self._settle_left = self.recipe.batchnorm_batches
            self._start_settling()
            for norm in self._settling:
                norm.reset_running_stats()

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
