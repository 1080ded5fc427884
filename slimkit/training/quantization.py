"""The callback that switches to quantization-aware training in the last part of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from slimkit.batches import first_sample, inputs_of
from slimkit.quantization.calibration import maker
from slimkit.quantization.fake import FakeQuantization
from slimkit.recipe import Quantize
from slimkit.registry import discover
from slimkit.training.timeline import progress, total_batches

if TYPE_CHECKING:
    from slimkit.training.module import SlimModule


class QuantizationCallback(pl.Callback):
    """Observes ranges on training batches, then rounds until the end of the training.

    Args:
        module: owns the network and its fake-quantizers.
        recipe: the quantize section; `train_from` is set.
        backend: the first of the recipe's backends, whose arithmetic is trained for.
    """

    def __init__(self, module: SlimModule, recipe: Quantize, backend: str) -> None:
        self.module = module
        self.recipe = recipe
        self.backend = backend

    def on_train_batch_start(
        self, trainer: pl.Trainer, _module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Insert the fake-quantizers when their time has come; round once ranges are known."""
        assert self.recipe.train_from is not None
        if progress(trainer, batch_idx) < self.recipe.train_from:
            return
        module, state = self.module, self.module.state
        if module.fake is None:
            inputs = first_sample(inputs_of(batch, module.network))
            state.example_inputs = inputs
            module.fake = FakeQuantization.of(
                module.network,
                inputs,
                discover().create("backend", self.backend).scheme,
                maker(self.recipe.weights.model_dump()),
                maker(self.recipe.activations.model_dump()),
                self.recipe.keep_float,
            )
            module.fake.state = "observe"
            state.observed = 0
        elif module.fake.state == "observe":
            state.observed += 1
            left = (1 - self.recipe.train_from) * total_batches(trainer)
            if state.observed >= min(self.recipe.calibration_batches, max(1, left // 4)):
                module.fake.state = "quantize"
                module.say(f"quantization-aware: training for {self.backend} from here on")
