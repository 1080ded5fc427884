"""The callback that switches to quantization-aware training in the last part of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.nn.modules.batchnorm import _BatchNorm

from slimkit.batches import first_sample
from slimkit.copies import copied
from slimkit.deploy.agreement import compare
from slimkit.errors import QuantizationError, SlimkitError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Scheme, tensors_of
from slimkit.quantization.calibration import maker
from slimkit.quantization.fake import FakeQuantization, learns
from slimkit.recipe import PluginRef, Quantize
from slimkit.registry import discover
from slimkit.training.averages import copies_of
from slimkit.training.optimizers import add_group_, optimizer_of
from slimkit.training.ranks import average_gradients_, check_alike, several, share_
from slimkit.training.strategies import check_strategy
from slimkit.training.timeline import progress, total_batches

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


def scheme_of(backend: PluginRef, recipe: Quantize) -> Scheme:
    """The arithmetic of one of the recipe's backends, with weights as wide as the recipe says."""
    made = discover().create("backend", backend.name, backend.options)
    return made.scheme_with(recipe.weight_bits)


class QuantizationCallback(pl.Callback):
    """Observes ranges on training batches, then rounds until the end of the training.

    Learned ranges get a parameter group in the first optimizer when rounding begins. With several
    processes, ranges are those of the first one's batches; gradients of learned ranges are
    averaged.

    Args:
        module: owns the network and its fake-quantizers.
        recipe: the quantize section; `train_from` is set.
        backend: the first of the recipe's backends, whose arithmetic is trained for.

    Raises:
        SlimkitError: an option would do nothing.
    """

    def __init__(self, module: SlimModule, recipe: Quantize, backend: PluginRef) -> None:
        self.module = module
        self.recipe = recipe
        self.backend = backend.name
        self.scheme = scheme_of(backend, recipe)
        self._frozen: set[str] = set()  # what has been said to be
        self._tried = False
        chosen = recipe.activations
        learned = learns(maker(chosen.model_dump())(self.scheme.activations))
        if learned and recipe.observe == "always":
            raise SlimkitError(
                f"quantize.observe: {chosen.name} learns its ranges by gradient and follows no "
                "data: leave 'observe' out, or choose another quantizer of activations"
            )
        if recipe.freeze_ranges_at is not None and not learned and recipe.observe == "once":
            raise SlimkitError(
                f"quantize.freeze_ranges_at: ranges of {chosen.name} stay as they are anyway: "
                "leave it out, let them follow the data with 'observe: always', or learn them with "
                "'activations: lsq'"
            )

    def on_fit_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Give a resumed run its parameter group, before the optimizer's state is restored."""
        check_strategy(trainer, "quantization-aware training", "leave out quantize.train_from")
        if self.module.fake is not None and self.module.fake.state == "quantize":
            self._train_ranges(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, _module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Insert the fake-quantizers when their time has come; round once ranges are known."""
        assert self.recipe.train_from is not None
        now = progress(trainer, batch_idx)
        if now < self.recipe.train_from:
            if not self._tried:  # so that what no file can hold is said before any training
                self.module.entry.tried(batch)
                self._tried = True
            return
        module, state = self.module, self.module.state
        if module.recipe.prune is not None and not state.cut:
            return  # what is rounded is the network that is left
        if module.fake is None:
            whole = module.entry.tried(batch)
            inputs = first_sample(whole)
            state.example_inputs = inputs
            module.fake = FakeQuantization.of(
                module.network,
                inputs,
                self.scheme,
                maker(self.recipe.weights.model_dump()),
                maker(self.recipe.activations.model_dump()),
                self.recipe.keep_float,
                whole,
            )
            module.fake.state = "observe"
            state.observed = 0
            self._copy_ranges(trainer, module.fake)
        elif module.fake.state == "observe":
            state.observed += 1
            left = (1 - self.recipe.train_from) * total_batches(trainer)
            if state.observed >= min(self.recipe.calibration_batches, max(1, left // 4)):
                self._begin(trainer, module.fake)
        if module.fake.state == "quantize":
            module.fake.follows = self.recipe.observe == "always"
            self._freeze(module.fake, now)

    def on_after_backward(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Average the gradients of learned ranges, which DDP does not know."""
        fake = self.module.fake
        if fake is not None and fake.state == "quantize" and several():
            average_gradients_(fake.parameters())

    def on_train_batch_end(
        self, _trainer: pl.Trainer, _module: pl.LightningModule, *_rest: Any
    ) -> None:
        """Give every process the ranges that follow the first one's batches."""
        fake = self.module.fake
        if fake is not None and fake.state == "quantize" and fake.follows and several():
            share_(b for name in fake.sites.activations for b in fake[name].buffers())

    def on_train_epoch_end(self, _trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log ``slimkit/sqnr_db``, the least over the outputs for one sample, beside float."""
        fake = self.module.fake
        if fake is None or fake.state != "quantize":
            return
        network, inputs = self.module.network, self.module.state.example_inputs
        with isolate_rng(), evaluating(network), torch.no_grad():
            plain = tensors_of(network(*inputs))
            with fake.active(network):
                rounded = tensors_of(network(*inputs))
        ratio = min(compare(plain, rounded).sqnr_db, default=math.inf)
        if math.isfinite(ratio):
            module.log("slimkit/sqnr_db", ratio, rank_zero_only=True)

    def _begin(self, trainer: pl.Trainer, fake: FakeQuantization) -> None:
        """Round from here on."""
        if several():
            share_([*fake.parameters(), *fake.buffers()])
        ranges = fake.ranges(dict(self.module.network.named_parameters(remove_duplicate=False)))
        if several():
            check_alike(ranges, "range", QuantizationError)
        fake.state = "quantize"
        self._train_ranges(trainer)
        self._copy_ranges(trainer, fake)
        self.module.say(f"quantization-aware: training for {self.backend} from here on")

    def _copy_ranges(self, trainer: pl.Trainer, fake: FakeQuantization) -> None:
        """Give averaged copies of the module what it has of ranges now, to go on with it."""
        for copy in copies_of(self.module, trainer):
            copy.fake = copied(fake)

    def _train_ranges(self, trainer: pl.Trainer) -> None:
        """Put learned ranges into the first optimizer."""
        assert self.module.fake is not None
        learned = {f"fake.{name}": p for name, p in self.module.fake.named_parameters()}
        if not learned:
            return
        if not trainer.optimizers:
            raise SlimkitError(
                "learned ranges need an optimizer, but configure_optimizers gave none: choose "
                "quantizers without parameters, such as minmax"
            )
        add_group_(
            optimizer_of(trainer.optimizers, self.module.network),
            learned,
            [config.scheduler for config in trainer.lr_scheduler_configs],
            learning_rate_scale=self.recipe.learning_rate_scale,
            weight_decay=self.recipe.weight_decay,
            place=self.module.places.get("learned ranges"),
        )

    def _freeze(self, fake: FakeQuantization, now: float) -> None:
        """Fix what the recipe fixes from here on; Lightning and a resumed run forget it."""
        ranges, norms = self.recipe.freeze_ranges_at, self.recipe.freeze_batchnorm_at
        if ranges is not None and now >= ranges:
            fake.follows = False
            for name in fake.sites.activations:
                for parameter in fake[name].parameters():
                    parameter.requires_grad_(False)
                    parameter.grad = None
            self._say_once("ranges of activations")
        if norms is not None and now >= norms:
            for part in self.module.network.modules():
                if isinstance(part, _BatchNorm) and part.track_running_stats:
                    part.eval()
            self._say_once("batch-norm statistics")

    def _say_once(self, what: str) -> None:
        if what not in self._frozen:
            self._frozen.add(what)
            self.module.say(f"{what} stay as they are from here on")
