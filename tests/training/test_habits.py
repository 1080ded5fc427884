"""What people's own modules, optimizers and averages do while slimkit works around them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit import Batches, Lit, Manual, fit, network
from nets import normal
from pytorch_lightning.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from slimkit import SlimModule
from slimkit.errors import PluginError, PruningError, QuantizationError, SlimkitError
from slimkit.pruning.removal import remove_
from slimkit.training.optimizers import shrink_optimizers_
from slimkit.training.run import EpochLine

PRUNE = {"criterion": "l1", "target": {"flops": 0.6}, "during": [0.0, 0.5], "steps": 2}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*not been set for this class"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`"),
    pytest.mark.filterwarnings("ignore:.*training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no"),
]


def slim(module: pl.LightningModule, **recipe: Any) -> SlimModule:
    torch.manual_seed(0)
    return SlimModule(module, {"distill": False, **recipe})


# --- the timeline -----------------------------------------------------------------------------


class Stream(IterableDataset):
    """Batches without an end."""

    def __iter__(self) -> Any:
        while True:
            yield normal(8, 3, 8, 8), torch.arange(8) % 4


class Endless(Batches):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), None)


def test_data_without_an_end_has_a_timeline_of_steps() -> None:
    module = slim(Lit(), prune=PRUNE)
    said: list[tuple[int, str]] = []
    module.announce = lambda line: said.append((module.trainer.global_step, line))
    fit(module, Endless(), max_epochs=-1, max_steps=20, limit_val_batches=0)
    steps = [step for step, line in said if "masked" in line]
    assert steps == [5, 10]
    assert module.state.cut


def test_steps_by_hand_do_not_tell_how_long_a_training_is() -> None:
    with pytest.raises(SlimkitError, match="leave it out and set max_epochs"):
        fit(slim(Manual(), prune=PRUNE), max_epochs=-1, max_steps=8)
    fit(module := slim(Manual(), prune=PRUNE), max_epochs=2)
    assert module.state.cut


def test_weights_move_within_an_epoch_though_the_step_takes_no_number() -> None:
    class Short(Lit):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return self.criterion(self(batch[0]), batch[1])

    weight = {"value": 1.0, "schedule": "warm-up", "during": [0.0, 1.0]}
    module = SlimModule(Short(), {"distill": {"losses": [{"name": "kl", "weight": weight}]}})
    seen: list[float] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["distill/weight/kl@output"]))

    fit(module, callbacks=[Look()])
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_the_epochs_line_tells_the_ratio_of_its_own_epoch(tmp_path: Path) -> None:
    lines: list[str] = []
    logged: list[str] = []

    class Note(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            ratio = trainer.callback_metrics.get("slimkit/sqnr_db")
            logged.append("" if ratio is None else f"SQNR {float(ratio):.1f} dB")

    callbacks = [EpochLine(lines.append), Note()]
    fit(
        slim(Lit(), quantize={"train_from": 0.3}),
        max_epochs=4,
        callbacks=callbacks,
        enable_checkpointing=True,
    )
    assert logged[2]
    assert logged[2] in lines[1]
    assert logged[3] in lines[2]


# --- batch-norm, gradients --------------------------------------------------------------------


def test_batchnorm_that_stays_in_evaluation_mode_keeps_its_statistics() -> None:
    class Frozen(Lit):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[1].eval()

    module = slim(Frozen(), prune=PRUNE)
    module.inner.net[1].running_mean.copy_(torch.arange(8.0))
    fit(module, max_epochs=2)
    kept = module.network.slimkit_pruning.kept["net.1.running_mean"][0]
    assert module.inner.net[1].running_mean.tolist() == kept
    assert module.inner.net[4].num_batches_tracked > 0


class LeftOut(Lit):
    """Leaves every third batch out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)


class Turns(Lit):
    """Two heads that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        features = self.net[:8](x)
        return self.net[8](features), self.other(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0])[batch_idx % 2], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.criterion(self(batch[0])[0], batch[1]))


@pytest.mark.parametrize("kind", [LeftOut, Turns])
@pytest.mark.parametrize("growing", [False, True])
def test_gradients_need_not_come_in_every_batch(kind: type[Lit], growing: bool) -> None:
    prune = {**PRUNE, "criterion": "taylor"}
    if growing:
        prune |= {"regularizer": "growing", "schedule": "one-shot"}
    fit(module := slim(kind(), prune=prune), max_epochs=2)
    assert module.state.cut


def test_weights_without_a_gradient_in_any_batch_are_said() -> None:
    class Unused(Turns):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, 0)

    with pytest.raises(PruningError, match=r"the loss gave other.0.weight none"):
        fit(slim(Unused(), prune={**PRUNE, "criterion": "taylor"}), max_epochs=2)


class Recomputed(Lit):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.net[:3], x.requires_grad_(), use_reentrant=self.reentrant)
        return self.net[3:](x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_anew_in_the_backward_is_not_rounded_blindly(reentrant: bool) -> None:
    Recomputed.reentrant = reentrant
    with pytest.raises(QuantizationError, match="computed a second time in the backward"):
        fit(slim(Recomputed(), quantize={"train_from": 0.5}))
    fit(slim(Recomputed(), prune=PRUNE), max_epochs=2)


# --- distillation -----------------------------------------------------------------------------


def test_a_forward_for_a_metric_is_not_what_is_learnt_from() -> None:
    class Metric(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.log("train_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())
            return 0.0 * loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    module = SlimModule(Metric(), {"distill": {"losses": [{"name": "feature-mse", "at": "net.4"}]}})
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.mul_(1.1)
    before = module.network.net[3].weight.clone()
    fit(module)
    assert not torch.allclose(module.network.net[3].weight, before, atol=1e-5)


def test_a_loss_out_of_reach_of_the_weights_is_said_with_the_reason() -> None:
    class Aside(Lit):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.net[:6](x)
            return self.net[6:](x)

    module = SlimModule(Aside(), {"distill": {"losses": [{"name": "feature-mse", "at": "net.4"}]}})
    said: list[str] = []
    module.announce = said.append
    fit(module)
    (line,) = [line for line in said if "trains nothing" in line]
    assert "it is computed under torch.no_grad(), or in a checkpoint with" in line


@pytest.mark.parametrize("loss", ["kl", "dist"])
def test_a_single_logit_has_no_softmax(loss: str) -> None:
    class Binary(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logit = self(batch[0])[:, 0]
            return functional.binary_cross_entropy_with_logits(logit, (batch[1] > 1).float())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, 0))

    binary = Binary()
    binary.net[8] = nn.Linear(12, 1)
    with pytest.raises(PluginError, match="take bce-logits"):
        fit(SlimModule(binary, {"distill": {"losses": [{"name": loss}]}}))
    fit(SlimModule(binary, {"distill": {"losses": [{"name": "bce-logits"}]}}))


class Odd(Batches):
    """Its last batch is one sample."""

    def train_dataloader(self) -> Any:
        return DataLoader(torch.utils.data.Subset(self.train, range(17)), 8)


def test_a_left_out_sample_is_a_loss_of_zero_whatever_it_holds() -> None:
    module = SlimModule(Lit(), {"distill": {"losses": [{"name": "pkt", "at": "net.7"}]}})
    fit(module, Odd())
    (comparison,) = module.distillation[0].comparisons
    student = torch.tensor([[float("-inf"), 1e38, 1e38]], requires_grad=True)
    value = comparison.value(0, (student,), (torch.ones(1, 3),), None)
    value.backward()
    assert (value.item(), student.grad.tolist()) == (0.0, [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("loss", ["rkd", "similarity", "pkt", "crd"])
def test_relations_leave_a_last_single_sample_out(loss: str) -> None:
    module = SlimModule(Lit(), {"distill": {"losses": [{"name": loss, "at": "net.7"}]}})
    trainer = fit(module, Odd(), max_epochs=2)
    assert trainer.callback_metrics[f"distill/{loss}@net.7"] == 0.0


class Gan(pl.LightningModule):
    """The discriminator's step first, as in the tutorial on DCGAN."""

    toggle = False

    def __init__(self, first: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first = first
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
        self.discriminator = nn.Linear(12, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        g, d = optimizers if self.first == "generator" else optimizers[::-1]
        real, noise = batch[0].flatten(1)[:, :12], normal(8, 8)
        d.zero_grad()
        apart = self.discriminator(self.generator(noise).detach()) - self.discriminator(real)
        self.manual_backward(apart.mean())
        d.step()
        g.zero_grad()
        self.manual_backward(-self.discriminator(self.generator(noise)).mean())
        g.step()

    def configure_optimizers(self) -> Any:
        made = [torch.optim.Adam(p.parameters()) for p in (self.generator, self.discriminator)]
        return made if self.first == "generator" else made[::-1]


@pytest.mark.parametrize("first", ["generator", "discriminator"])
def test_what_losses_and_ranges_learn_is_trained_with_the_network(first: str) -> None:
    module = SlimModule(
        Gan(first),
        {
            "network": "generator",
            "quantize": {"train_from": 0.4, "activations": "lsq"},
            "distill": {"losses": [{"name": "hint", "at": "0"}]},
        },
    )
    begun: dict[str, Tensor] = {}

    def learnt() -> dict[str, nn.Parameter]:
        ranges = {} if module.fake is None else dict(module.fake.named_parameters())
        return {**module.distillation[0].parameters(), **ranges}

    class Begin(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            for name, parameter in learnt().items():
                begun.setdefault(name, parameter.detach().clone())

    trainer = fit(module, max_epochs=4, callbacks=[Begin()])
    held = trainer.optimizers[0 if first == "generator" else 1].param_groups
    mine = {id(p) for group in held for p in group["params"]}
    assert {id(p) for p in learnt().values()} <= mine
    assert all(not torch.equal(begun[name], p) for name, p in learnt().items())


# --- optimizers, averages, checkpoints --------------------------------------------------------


def test_factored_moments_are_cut_with_their_parameters() -> None:
    layer, kept = nn.Conv2d(8, 12, 3, bias=False), {"weight": {0: [0, 3, 11], 1: [1, 2]}}
    optimizer = torch.optim.Adafactor(layer.parameters(), 1e-3)
    layer(normal(2, 8, 5, 5)).square().sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[layer.weight].items()}
    assert (before["row_var"].shape, before["col_var"].shape) == ((12, 8, 3, 1), (12, 8, 1, 3))
    shapes = {"weight": tuple(layer.weight.shape)}
    remove_(layer, kept)
    shrink_optimizers_([optimizer], layer, kept, shapes)
    after = optimizer.state[layer.weight]
    for name in ("row_var", "col_var"):
        assert torch.equal(after[name], before[name][[0, 3, 11]][:, [1, 2]])
    assert torch.equal(after["step"], before["step"])
    layer(normal(2, 2, 5, 5)).square().sum().backward()
    optimizer.step()


def test_a_preconditioner_goes_with_all_of_its_parameters_state() -> None:
    layer, kept = nn.Linear(4, 6), {"weight": {0: [0, 3]}, "bias": {0: [0, 3]}}
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    for parameter in layer.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.ones_like(parameter), "step": 3}
    optimizer.state[layer.weight]["preconditioners"] = [torch.eye(6), torch.eye(4)]
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    remove_(layer, kept)
    shrink_optimizers_([optimizer], layer, kept, shapes)
    assert optimizer.state[layer.weight] == {}
    assert torch.equal(optimizer.state[layer.bias]["momentum_buffer"], torch.ones(2))


def test_an_optimizer_of_all_parameters_in_one_begins_anew() -> None:
    class Whole(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=2)

    fit(module := slim(Whole(), prune=PRUNE), max_epochs=2)
    assert module.state.cut


class Inside(Lit):
    """Averages itself as PyTorch's documentation has it, or in a copy that is not frozen."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.ema: nn.Module
        if own:
            self.ema = copy.deepcopy(self.net)
        else:
            self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        if isinstance(self.ema, AveragedModel):
            self.ema.update_parameters(self.net)
            return
        for mine, theirs in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.05)


class Shadow(pl.Callback):
    """An average in a callback: a module, or tensors by name."""

    def __init__(self, by_name: bool) -> None:
        self.by_name = by_name

    def on_fit_start(self, _trainer: pl.Trainer, module: Any) -> None:
        if self.by_name:
            self.ema: Any = {n: p.detach().clone() for n, p in module.named_parameters()}
        else:
            self.ema = AveragedModel(module.net, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    @torch.no_grad()
    def on_train_batch_end(self, _trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if not self.by_name:
            self.ema.update_parameters(module.net)
            return
        for name, parameter in module.named_parameters():
            self.ema[name].lerp_(parameter, 0.5)


@pytest.mark.parametrize("part", [None, "net"])
@pytest.mark.parametrize("how", ["AveragedModel", "copy", "callback", "names"])
def test_averages_of_the_users_own_are_cut_with_the_network(how: str, part: str | None) -> None:
    callbacks = [Shadow(how == "names")] if how in ("callback", "names") else []
    inner = Lit() if callbacks else Inside(how == "copy")
    module = slim(inner, prune=PRUNE, network=part)
    fit(module, max_epochs=4, callbacks=callbacks)
    ema = callbacks[0].ema if callbacks else module.inner.ema
    if how == "names":
        found = {n.removeprefix("inner.net."): t for n, t in ema.items()}
    else:
        found = dict(getattr(ema, "module", ema).named_parameters())
    for name, parameter in module.inner.net.named_parameters():
        assert found[name].shape == parameter.shape
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0.5, atol=0.1)


def test_a_copy_that_has_not_moved_stays_whole_and_is_named() -> None:
    class Fixed(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.first = copy.deepcopy(self.net).requires_grad_(False)

    module = slim(Fixed(), prune=PRUNE, network="net")
    said: list[str] = []
    module.announce = said.append
    fit(module, max_epochs=2)
    assert module.inner.first[0].weight.shape == network()[0].weight.shape
    assert any("first looks like the network and has not changed so far" in s for s in said)


@pytest.mark.filterwarnings("ignore:You have not specified")
def test_rounded_averages_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    def fitted(**options: Any) -> SlimModule:
        module = slim(Lit(), prune=PRUNE, quantize={"train_from": 0.6, "activations": "lsq"})
        keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        fit(module, max_epochs=5, callbacks=[EMAWeightAveraging(), keep], **options)
        return module

    whole = fitted()
    again = fitted(ckpt_path=tmp_path / "epoch=3.ckpt")
    assert again.fake.state == whole.fake.state == "quantize"
    assert again.network.net[3].weight.shape == whole.network.net[3].weight.shape


def test_groups_that_come_later_keep_their_place_in_a_run_that_goes_on(tmp_path: Path) -> None:
    class Thaw(BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.01)

    class Partly(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)

    def groups(**options: Any) -> list[int]:
        losses = [{"name": "hint", "at": "net.2"}]
        module = SlimModule(Partly(), {"distill": {"losses": losses}})
        keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        trainer = fit(module, max_epochs=3, callbacks=[Thaw(), keep], **options)
        return [len(group["params"]) for group in trainer.optimizers[0].param_groups]

    assert groups() == groups(ckpt_path=tmp_path / "epoch=1.ckpt") == [7, 2, 1]


def test_a_state_dict_of_the_users_own_is_what_a_checkpoint_holds(tmp_path: Path) -> None:
    """As Lightning's page on checkpoints leaves a frozen part out."""

    class Partial(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.perceptual = nn.Conv2d(3, 4, 1).requires_grad_(False)
            self.strict_loading = False

        def state_dict(self) -> Any:  # type: ignore[override]
            return {k: v for k, v in super().state_dict().items() if "perceptual" not in k}

    keep = ModelCheckpoint(tmp_path, save_last=True)
    fit(module := slim(Partial(), prune=PRUNE, network="net"), max_epochs=2, callbacks=[keep])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert "inner.net.0.weight" in saved
    assert not any("perceptual" in name for name in saved)
    again = slim(Partial(), prune=PRUNE, network="net")
    fit(again, max_epochs=3, callbacks=[keep], ckpt_path=tmp_path / "last.ckpt")
    assert again.inner.net[0].weight.shape == module.inner.net[0].weight.shape


def test_loggers_get_the_modules_example() -> None:
    inner = Lit()
    inner.example_input_array = normal(1, 3, 8, 8)
    assert torch.equal(slim(inner).example_input_array, inner.example_input_array)


def test_a_part_that_is_trained_later_is_cut_by_its_own_groups_only() -> None:
    """Two branches alike; no optimizer holds the second one from the beginning."""

    class Branches(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.other = copy.deepcopy(self.net)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.other(x)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.05)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": [*self.other.parameters()]})

    module = slim(Branches(), prune={**PRUNE, "target": {"flops": 0.4}})
    fit(module, max_epochs=4)
    assert module.inner.other[0].out_channels == module.inner.other[3].in_channels
    with torch.no_grad():
        module.inner(normal(2, 3, 8, 8))


def test_what_setup_adds_is_said_and_may_stay() -> None:
    class Perceptual(Lit):
        def setup(self, stage: str) -> None:
            self.vgg = nn.Conv2d(3, 4, 1).requires_grad_(False)

    module, said = slim(Perceptual(), prune=PRUNE), list[str]()
    module.announce = said.append
    fit(module, max_epochs=2)
    assert any("setup of Perceptual adds vgg.weight and more" in line for line in said)


# --- what cannot work -------------------------------------------------------------------------


def test_the_other_package_of_lightning_is_named() -> None:
    theirs = type("Theirs", (nn.Module,), {"__module__": "lightning.pytorch.core.module"})
    with pytest.raises(SlimkitError, match="import pytorch_lightning as pl"):
        SlimModule(theirs(), {})


def test_a_network_that_is_built_in_setup_is_refused_before_training() -> None:
    class Late(Lit):
        def setup(self, stage: str) -> None:
            self.net[8] = nn.Linear(12, 4)

    with pytest.raises(SlimkitError, match="setup of Late builds another network"):
        fit(slim(Late(), prune=PRUNE))
