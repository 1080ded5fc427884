"""The callback that prunes: masks grow during a window, then the channels are cut out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
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
from slimkit.pruning.scores import DATA, group_scores, samples_in, scores_over_batches
from slimkit.pruning.selection import Selector
from slimkit.pruning.sensitivity import Curve
from slimkit.pruning.statistics import MEASURED, Measured, measure
from slimkit.pruning.targets import Target
from slimkit.recipe import Prune
from slimkit.registry import discover
from slimkit.training.optimizers import shrink_optimizers_
from slimkit.training.timeline import progress

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
    curves: Sequence[Curve] | None = None,
) -> Selector:
    """What chooses the channels that a recipe's options, and the runtimes it exports to, leave.

    Raises:
        PruningError: an option does not fit the network, or the recipe's ratios follow from a
            sensitivity scan and there are no `curves`.
    """
    by_curves = recipe.ratios == "sensitivity"
    if by_curves and curves is None:
        raise PruningError(
            "prune.ratios: sensitivity needs a scan: start the recipe with `slimkit run`, or set "
            "the module's `curves` to what slimkit.training.pruning_scan.curves_of gives"
        )
    return Selector(
        network,
        coupling,
        inputs,
        round_to=recipe.round_to,
        min_channels=recipe.min_channels,
        ranking=recipe.ranking,
        max_ratio=recipe.max_ratio,
        ratios=None if recipe.ratios == "sensitivity" else recipe.ratios,
        multiple=channel_multiple(backends),
        protect_first=recipe.protect_first,
        curves=curves if by_curves else None,
    )


def scores_of(
    inner: pl.LightningModule,
    network: nn.Module,
    coupling: Coupling,
    recipe: Prune,
    batches: Iterable[Any],
) -> dict[str, Tensor]:
    """What the recipe's criterion says of each group's channels, before any training.

    Args:
        inner: gives the loss, where the criterion needs gradients.
        network: its network.
        coupling: the network's groups.
        recipe: names the criterion.
        batches: training batches, for gradients and activations.

    Raises:
        SlimkitError: the criterion needs a loss, and `inner` gives none.
    """
    ref = recipe.criterion
    criterion: Criterion = discover().create("criterion", ref.name, ref.options)
    if not criterion.needs & DATA:
        return group_scores(network, coupling, criterion)

    def loss(_network: nn.Module, batch: Any) -> Tensor:
        output: Any = inner.training_step(batch, 0)
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise SlimkitError(
                f"criterion {ref.name!r} needs the loss that training_step returns, but it "
                f"returned {type(loss).__name__}; choose one such as 'l1'"
            )
        return loss

    inner.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign]
    try:
        count = recipe.data_batches
        return scores_over_batches(network, coupling, criterion, batches, loss, count)
    finally:
        del inner.log


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
        self._scores: dict[str, Tensor] = {}
        self._recent: deque[Any] = deque(maxlen=recipe.data_batches)  # what a forward measures
        self._measured: dict[str, Measured] | None = None
        self._settling: dict[_BatchNorm, float | None] = {}
        self._settle_left = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {"scores": self._scores, "settle_left": self._settle_left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scores collected and the batch-norm batches left."""
        self._scores, self._settle_left = state_dict["scores"], state_dict["settle_left"]

    def on_train_start(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Go on settling batch-norm where the run was resumed in the middle of it."""
        if self._settle_left and not self._settling:
            self._start_settling()

    def on_train_epoch_start(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Forget the batches of the epoch before, which a resumed run has not seen."""
        self._recent.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, _module: pl.LightningModule, batch: Any, _batch_idx: int
    ) -> None:
        """Analyse at the first batch; cut when the window has closed."""
        state = self.module.state
        if not state.cut and self.masks is None:
            state.example_inputs = first_sample(inputs_of(batch, self.module.network))
            self._analyse()
        if not state.cut and self.criterion.needs & MEASURED:
            self._recent.append(batch)
        if not state.cut and state.updates >= self._updates:
            self._cut(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        _module: pl.LightningModule,
        _outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Collect scores, take the next step of the schedule, keep dead channels dead."""
        self._settle()
        state = self.module.state
        if state.cut or self.masks is None:
            return
        begin, end = self.recipe.during
        now = progress(trainer, batch_idx + 1)
        if now >= begin:
            needs_gradient = bool(self.criterion.needs & {"gradient", "fisher"})
            if needs_gradient:
                self._collect_scores(samples_in(batch))
            window = max(end - begin, 1e-9)
            due = min(self._updates, math.floor((now - begin) / window * self._updates + 1e-9))
            if end == begin or now >= end:
                due = self._updates
            if due > state.updates:
                if not needs_gradient:
                    self._collect_scores()
                self._update(due)
        self.masks.apply_(self.module.network)

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
                    if not self._recent:
                        few = islice(trainer.train_dataloader or (), self.recipe.data_batches)
                        self._recent.extend(few)
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
        self.selector = selector_of(
            network, coupling, inputs, self.recipe, backends, self.module.curves
        )
        # A target out of reach is said now, not after the window
        flat = {g.name: torch.ones(g.channels, dtype=torch.float64) for g in coupling.groups}
        self.selector.choose(flat, self.target)

    def _collect_scores(self, samples: int = 1) -> None:
        """Add the scores of the present weights and gradients to those since the last update.

        Activations are those of the epoch's last `data_batches` batches. The Fisher information is
        estimated by the squared gradient of a batch's mean loss times its `samples`.
        """
        assert self.masks is not None
        network, needs = self.module.network, self.criterion.needs
        squares = None
        if "fisher" in needs:
            named = network.named_parameters(remove_duplicate=False)
            squares = {n: samples * p.grad.square() for n, p in named if p.grad is not None}
        if needs & MEASURED and self._measured is None:
            self._measured = measure(network, self._recent, len(self._recent))
        scores = group_scores(network, self.masks.coupling, self.criterion, self._measured, squares)
        for name, score in scores.items():
            self._scores[name] = self._scores.get(name, torch.zeros_like(score)) + score

    def _update(self, due: int) -> None:
        assert self.masks is not None
        assert self.selector is not None
        fraction = due / self._updates
        amount = fraction if self.recipe.schedule != "cubic" else 1 - (1 - fraction) ** 3
        scores = self.masks.silence(self._scores)
        state = self.module.state
        choice = self.selector.choose(scores, self.target, progress=amount, carried=state.carried)
        self.masks.kept = choice.kept
        self._scores, self._measured = {}, None
        state.updates = due
        state.living = {name: kept.clone() for name, kept in choice.kept.items()}
        state.carried = choice.carried
        state.macs_left = choice.macs / self.selector.dense_macs

    def _cut(self, trainer: pl.Trainer) -> None:
        """Remove the dead channels, from the optimizers too, and settle batch-norm."""
        assert self.masks is not None
        network, state = self.module.network, self.module.state
        named = network.named_parameters(remove_duplicate=False)
        shapes = {name: tuple(p.shape) for name, p in named}
        assert self.selector is not None
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
