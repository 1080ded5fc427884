"""Lightning's own tools go on working around a network that changes while it trains."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from examples import Classifier, Loaded, _pairs, images, pairs
from lit import fit
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from torch import nn
from torch.utils.data import DataLoader

from slimkit import SlimModule
from slimkit.errors import SlimkitError
from slimkit.training.evaluation import _choose
from slimkit.training.strategies import check_strategy

RECIPE = {
    "prune": {"criterion": "l1", "target": {"flops": 0.6}, "during": [0.0, 0.5], "steps": 2},
    "quantize": {"train_from": 0.75},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*not been set for this class"),
    pytest.mark.filterwarnings("ignore:You are overfitting on"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def slim(**more: Any) -> SlimModule:
    torch.manual_seed(0)
    return SlimModule(Classifier(), {**RECIPE, **more})


class Losses(pl.Callback):
    """The validation loss of each epoch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, _module: Any) -> None:
        self.found.append(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.parametrize("again", ["the same module", "another module"])
def test_any_checkpoint_of_a_run_can_be_evaluated(again: str, tmp_path: Path) -> None:
    """Also one from before the cut, in a module that has been cut and rounded since."""
    module, losses = slim(), Losses()
    kept = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = fit(module, pairs(), max_epochs=8, callbacks=[kept, losses])
    assert module.state.cut
    assert module.fake is not None
    for epoch in (1, 7, 4, 0):
        shown = module if again == "the same module" else slim()
        file = tmp_path / f"epoch={epoch}.ckpt"
        (found,) = trainer.validate(
            shown, dataloaders=pairs().val_dataloader(), ckpt_path=file, verbose=False
        )
        assert found["val_loss"] == pytest.approx(losses.found[epoch], rel=1e-6)


def test_a_training_goes_on_from_a_checkpoint_before_the_cut_in_the_same_module(
    tmp_path: Path,
) -> None:
    whole = slim()
    kept = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(whole, pairs(), max_epochs=8, callbacks=[kept])
    expected = copy.deepcopy(whole.state_dict())
    fit(whole, pairs(), max_epochs=8, callbacks=[kept], ckpt_path=tmp_path / "epoch=1.ckpt")
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name


def test_overfitting_one_batch_goes_through_the_whole_timeline() -> None:
    module = slim()
    fit(module, pairs(), max_epochs=8, overfit_batches=1)
    assert module.state.cut
    assert module.fake is not None


def test_a_run_that_stops_early_is_cut_all_the_same() -> None:
    module = slim()
    stop = EarlyStopping("val_loss", patience=0, min_delta=100.0)
    trainer = fit(module, pairs(), max_epochs=8, callbacks=[stop])
    assert trainer.current_epoch == 2
    assert module.state.cut
    assert module.state.macs_left <= 0.62


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)]
)
def test_teachers_compute_in_the_precision_of_the_training(
    precision: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    module = slim()
    fit(module, pairs(), max_epochs=4, precision=precision)
    assert next(module.network.parameters()).dtype == dtype
    assert module.state.distilled
    release = module.export(tmp_path / "out", pairs())
    assert all(row.agreement.share == 1.0 for row in release.rows if row.stage != "int8")


def test_gradients_may_be_gathered_by_a_schedule() -> None:
    module = slim()
    fit(module, pairs(), max_epochs=8, callbacks=[GradientAccumulationScheduler({0: 1, 2: 2})])
    assert module.fake is not None


class Sized(Loaded):
    def __init__(self) -> None:
        super().__init__(_pairs)
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, self.batch_size)


def test_a_batch_size_is_found_before_the_timeline_begins() -> None:
    module, data = slim(), Sized()
    fit(module, data, max_epochs=4, callbacks=[BatchSizeFinder(max_trials=2, steps_per_trial=2)])
    assert data.batch_size == 4
    assert module.state.cut


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, module: pl.LightningModule) -> None:
        self.freeze(module.model[0], train_bn=False)

    def finetune_function(self, module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.model[0], optimizer, lr=0.01, train_bn=False)


class Flat(Classifier):
    def configure_optimizers(self) -> Any:
        learning = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(learning, lr=0.01, momentum=0.9)


def test_a_backbone_may_be_unfrozen_on_the_way() -> None:
    torch.manual_seed(0)
    module = SlimModule(Flat(), RECIPE)
    trainer = fit(module, pairs(), max_epochs=8, callbacks=[Unfreezing()])
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    convolutions = [m for m in module.network.modules() if isinstance(m, nn.Conv2d)]
    assert {id(conv.weight) for conv in convolutions} <= held
    assert module.fake is not None


class Logged(pl.Callback):
    def __init__(self) -> None:
        self.rates: list[tuple[float, float]] = []
        self.ratio = math.nan

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        logged = float(trainer.callback_metrics["slimkit/lr"])
        self.rates.append((logged, self.rate))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]


def test_learning_rate_and_signal_to_noise_are_logged() -> None:
    module, seen = slim(), Logged()
    trainer = fit(module, pairs(), max_epochs=4, callbacks=[seen])
    assert len({rate for rate, _ in seen.rates}) > 4
    assert all(a == pytest.approx(b) for a, b in seen.rates)
    (x,) = module.state.example_inputs
    module.eval()
    with torch.no_grad():
        plain = module.network(x)
        assert module.fake is not None
        with module.fake.active(module.network):
            rounded = module.network(x)
    by_hand = 10 * math.log10(
        float(plain.double().square().sum() / (plain - rounded).double().square().sum())
    )
    assert float(trainer.callback_metrics["slimkit/sqnr_db"]) == pytest.approx(by_hand, abs=0.01)


def test_a_lazy_layer_is_no_obstacle_once_it_has_met_data() -> None:
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.model[1] = nn.LazyLinear(4)

    module = Lazy()
    module(images()[0])
    compressed = SlimModule(module, RECIPE)
    fit(compressed, pairs(), max_epochs=4)
    assert compressed.state.cut


def test_what_a_tuner_finds_reaches_the_wrapped_module() -> None:
    inner = Classifier()
    inner.lr, inner.batch_size = 0.5, 2
    slim = SlimModule(inner, {"prune": {"target": {"flops": 0.5}}})
    slim.lr = 0.25
    slim.lr, slim.batch_size = 0.125, 16
    assert (slim.inner.lr, slim.inner.batch_size) == (0.125, 16)
    assert (slim.lr, inner.lr) == (0.125, 0.5)
    slim.state = slim.state  # its own stay its own
    assert "state" not in vars(slim.inner)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_do_not_give_shapes_back_are_refused(strategy: str) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    with pytest.raises(SlimkitError, match="use strategy: ddp"):
        check_strategy(trainer, "pruning while training", "")


@pytest.mark.parametrize(
    ("logged", "name", "mode"),
    [
        (["val_loss", "val_acc"], "val_acc", "max"),
        (["val_mape", "val_top1"], "val_top1", "max"),
        (["val_mape"], "val_mape", "min"),
        (["val_heatmap_loss"], "val_heatmap_loss", "min"),
        (["val/accuracy_loss", "val/mIoU"], "val/mIoU", "max"),
        (["wer"], "wer", "min"),
        (["val_nll", "val_brier"], "val_nll", "min"),
    ],
)
def test_the_metric_is_told_by_the_words_of_its_name(logged, name: str, mode: str) -> None:
    found = _choose(dict.fromkeys(logged, 0.5), gated=True)
    assert (found.name, found.mode) == (name, mode)


def test_a_metric_whose_name_tells_nothing_has_to_be_named_for_a_gate() -> None:
    with pytest.raises(SlimkitError, match=r"metric: \{name: val_foo, mode: max\}"):
        _choose({"val_foo": 1.0, "val_bar": 2.0}, gated=True)
    assert _choose({"val_foo": 1.0}, gated=False).name == "val_foo"


def test_a_validation_step_may_use_logger_and_data_module_in_the_export(tmp_path: Path) -> None:
    class Asking(Classifier):
        def validation_step(self, batch: Any, index: int) -> Any:
            self.logger.experiment.add_image("first", batch[0][0], 0)
            self.logger.log_metrics({"samples": len(batch[0])})
            self.log("tag", float(self.trainer.datamodule.tag))
            return super().validation_step(batch, index)

    data = pairs()
    data.tag = 3
    module = SlimModule(Asking(), {"quantize": {}})
    release = module.export(tmp_path / "small", data)
    assert release.rows[-1].metric is not None
