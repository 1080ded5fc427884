"""Pruning of channels while a network trains: masked during a window, then cut out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from slimkit.errors import PruningError, SlimkitError
from slimkit.interfaces import Criterion
from slimkit.pruning.cost import macs
from slimkit.pruning.coupling import Coupling
from slimkit.pruning.masks import Masks
from slimkit.pruning.prune import analyse, channel_multiple, cut_
from slimkit.pruning.regularizers import REGULARIZERS, Growing, Regularizer
from slimkit.pruning.removal import fitted, kept_positions, remove_, rescale_
from slimkit.pruning.schedules import amount
from slimkit.pruning.scores import Loss, group_scores, scores_over_batches
from slimkit.pruning.selection import Selector
from slimkit.pruning.sensitivity import Curve
from slimkit.pruning.statistics import Measured
from slimkit.pruning.targets import Target
from slimkit.recipe import Prune
from slimkit.registry import discover
from slimkit.training.entering import Entry
from slimkit.training.following import log_pruning
from slimkit.training.logged import logged
from slimkit.training.optimizers import shrink_optimizers_
from slimkit.training.ranks import averaged, check_alike, several
from slimkit.training.strategies import rewrap_
from slimkit.training.timeline import progress
from slimkit.training.twins import Twins
from slimkit.training.window import PruningCallback

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
    entry: Entry,
    coupling: Coupling,
    recipe: Prune,
    batches: Iterable[Any],
) -> dict[str, Tensor]:
    """What the recipe's criterion says of each group's channels, before any training.

    Args:
        entry: to the network of the module that gives the loss, where gradients are needed.
        coupling: the network's groups.
        recipe: names the criterion.
        batches: training batches, for gradients and activations.

    Raises:
        SlimkitError: the criterion needs a loss, and the module gives none.
    """
    ref = recipe.criterion
    criterion: Criterion = discover().create("criterion", ref.name, ref.options)
    with training_loss(entry.inner, ref.name) as loss:
        count = recipe.data_batches
        return scores_over_batches(
            entry.network, coupling, criterion, batches, loss, count, inputs=entry
        )


@contextmanager
def training_loss(inner: pl.LightningModule, criterion: str) -> Iterator[Loss]:
    """The loss of a module's own training step, which logs nothing inside.

    Args:
        inner: whose step it is.
        criterion: the name of what needs it, for the error.
    """

    def loss(_network: nn.Module, batch: Any) -> Tensor:
        output: Any = inner.training_step(batch, 0)
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise SlimkitError(
                f"criterion {criterion!r} needs the loss that training_step returns, but it "
                f"returned {type(loss).__name__}; choose one such as 'l1'"
            )
        return loss

    with logged(inner, lambda _name, _value: None):
        yield loss


class ChannelPruning(PruningCallback):
    """Masks channels of a `SlimModule`'s network on the recipe's timeline, then cuts them out.

    Args:
        module: owns the network and remembers what was done.
        recipe: the prune section.
    """

    lasting = False

    def __init__(self, module: SlimModule, recipe: Prune) -> None:
        super().__init__(module, recipe)
        self.target = target_of(recipe)
        self.selector: Selector | None = None
        self.regularizer: Regularizer | None = None
        self._twins: Twins | None = None
        self._chosen: dict[str, Tensor] = {}  # what a growing regularizer penalises

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {**super().state_dict(), "chosen": self._chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scores collected, the batch-norm batches left, the channels chosen."""
        super().load_state_dict(state_dict)
        self._chosen = state_dict.get("chosen", {})

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note what may follow the network, to see later whether it does."""
        super().on_train_start(trainer, module)
        if not self.module.state.cut:
            self._twins = Twins(self.module, trainer)

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        _module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Add the regularizer's gradient; criteria see the loss's alone where it can be told apart.

        Gradients are complete and unscaled here, and not clipped yet.
        """
        super().on_before_optimizer_step(trainer, _module, optimizer)
        if self.regularizer is None or self.module.state.cut:
            return
        begin, end = self._window
        if progress(trainer, self._batch_idx + 1) >= begin:
            automatic = self.module.automatic_optimization
            if self.needs_gradient and len(trainer.optimizers) == 1 and automatic:
                self._collect_scores()
                self._collected = True
            if isinstance(self.regularizer, Growing):
                passed = (progress(trainer, self._batch_idx) - begin) / max(end - begin, 1e-9)
                steps = self.recipe.steps
                self._grow(self.regularizer, min(steps, math.floor(passed * steps) + 1) / steps)
        self.regularizer.add_([p for group in optimizer.param_groups for p in group["params"]])

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
        if several():
            members = {g.name: sorted({m.tensor for m in g.members}) for g in coupling.groups}
            check_alike(members, "group of channels", PruningError)
        self.masks = Masks(coupling, self.module.state.living)
        backends = [plugin.name for plugin in self.module.recipe.export]
        self.selector = selector_of(
            network, coupling, inputs, self.recipe, backends, self.module.curves
        )
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
        assert isinstance(self.masks, Masks)
        assert self.selector is not None
        if not self._chosen:
            with self._gradients() as there:
                scores = self._scores or (self._scores_now() if there else {})
            if not scores:
                return  # the training step left this batch out
            if several():
                scores = averaged(scores, self._device)
            kept = self.selector.choose(
                self.masks.silence(scores), self.target, carried=self.module.state.carried
            ).kept
            groups = {g.name: torch.arange(g.channels) for g in self.masks.coupling.groups}
            self._chosen = {n: c[~torch.isin(c, kept[n])] for n, c in groups.items()}
            regularizer.chosen = self._chosen
            self._measured = None  # the next scores are of other weights
        regularizer.grown = grown

    def _score(
        self, measured: Mapping[str, Measured] | None, fisher: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        assert isinstance(self.masks, Masks)
        network, coupling = self.module.network, self.masks.coupling
        return group_scores(network, coupling, self.criterion, measured, fisher)

    def _scored(self) -> list[str]:
        assert isinstance(self.masks, Masks)
        members = (m.tensor for group in self.masks.coupling.groups for m in group.members)
        return [*dict.fromkeys(members)]

    def _scored_together(self) -> list[list[str]]:
        assert isinstance(self.masks, Masks)
        return [[m.tensor for m in group.members] for group in self.masks.coupling.groups]

    def _update(self, due: int) -> None:
        assert isinstance(self.masks, Masks)
        assert self.selector is not None
        left = self.selector.left(self.target)
        share = amount(self.recipe.schedule, due / self._updates, left)
        scores = self.masks.silence(self._scores)
        state = self.module.state
        choice = self.selector.choose(scores, self.target, progress=share, carried=state.carried)
        self.masks.kept = choice.kept
        self._scores, self._measured = {}, None
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

    def _finish(self, trainer: pl.Trainer) -> None:
        """Remove the dead channels, from optimizers and averages too."""
        assert isinstance(self.masks, Masks)
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
        if self._twins is not None:
            state.twins = [(twin.path, twin.of) for twin in self._twins.moved() if twin.path]
            for twin in self._twins.unmoved():
                self.module.say(
                    f"{twin.path or 'what a callback holds'} looks like {twin.of or 'the network'} "
                    "and has not changed so far: it keeps its channels"
                )
            kept, numbers = self._twins.cut_(pairs)
            report.kept.update(kept)
            report.attributes.update(numbers)
        shrink_optimizers_(trainer.optimizers, network, kept_positions(pairs), shapes)
        rewrap_(trainer)
        state.macs_left = macs(network, state.example_inputs) / report.macs[0]
        self.module.say(
            f"cut: {report.macs[1] / report.macs[0]:.1%} of the MACs and "
            f"{report.parameters[1] / report.parameters[0]:.1%} of the parameters are left"
        )
