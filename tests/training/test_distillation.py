"""Distillation: what is compared, how it is weighed, what is refused, and losses that learn."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit import Batches, Lit, fit
from nets import normal
from pytorch_lightning.callbacks import ModelCheckpoint
from strangers import strangers  # noqa: F401  # a fixture
from torch import Tensor, nn
from torch.nn import functional

from slimkit import SlimModule
from slimkit.errors import PluginError, SlimkitError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*callbacks used to create the checkpoint",
)

PRUNE = {
    "round_to": 1,
    "criterion": "l1",
    "target": {"flops": 0.5},
    "during": [0.0, 0.5],
    "steps": 2,
}


def recipe(*losses: Any, prune: bool = False, **distill: Any) -> dict[str, Any]:
    section = {"losses": [*losses], **distill}
    return {"distill": section, **({"prune": PRUNE} if prune else {"quantize": {}})}


def loss(name: str, at: Any = "output", **more: Any) -> dict[str, Any]:
    return {"name": name, "at": at, **more}


class Each(pl.Callback):
    """Calls a function with the trainer at the end, or the start, of each training batch."""

    def __init__(self, function: Any, when: str = "end") -> None:
        setattr(self, f"on_train_batch_{when}", lambda trainer, *args: function(trainer))


def one_step(slim: SlimModule, batch: Any) -> Tensor:
    """The training loss of one batch, outside of a trainer."""
    slim.log = slim.inner.log = lambda *args, **kwargs: None
    slim.train()
    return slim.training_step(batch, 0)


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    return Batches().train[:n]


# --- the same as ever -------------------------------------------------------------------------


def test_the_default_is_a_plain_loop_written_by_hand_to_the_last_bit() -> None:
    slim = SlimModule(Lit(), {"quantize": {}})
    fit(slim, max_epochs=2)
    student, teacher = Lit(), Lit().eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(2):
        for start in range(0, 32, 8):
            x, y = (t[start : start + 8] for t in Batches().train[:])
            logits = student(x)
            with torch.no_grad():
                log_t = (teacher(x) / 4).log_softmax(1)
            log_s = (logits / 4).log_softmax(1)
            soft = (log_t.exp() * (log_t - log_s)).sum(1).mean() * 16
            optimizer.zero_grad()
            (functional.cross_entropy(logits, y) + 0.5 * soft).backward()
            optimizer.step()
    for name, expected in student.named_parameters():
        torch.testing.assert_close(
            slim.inner.get_parameter(name), expected, rtol=1e-5, atol=1e-6, msg=name
        )


def test_a_strangers_loss_of_two_arguments_works(strangers: None) -> None:  # noqa: F811
    slim = SlimModule(Lit(), recipe(loss("plain", weight=2.0), label_weight=0))
    x, y = batch()
    apart = slim.network.train()(x) - Lit().eval()(x)
    expected = 2 * apart.abs().mean().item()
    assert one_step(SlimModule(Lit(), slim.recipe), (x, y)).item() == pytest.approx(expected, 1e-5)


# --- places -----------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    features: dict[str, Tensor]


class Nested(Lit):
    """Gives a dataclass with a dict in it; a part of it gives a tuple."""

    class Body(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.net[:6](x)
            return self.net[6:](features), features

    def __init__(self) -> None:
        super().__init__()
        self.body = self.Body(self.net)
        self.unused = nn.ModuleList([nn.Linear(1, 1)])

    def forward(self, x: Tensor) -> Any:
        logits, features = self.body(x)
        return Output(logits, {"last": features})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]).logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.criterion(self(batch[0]).logits, batch[1]))


@pytest.mark.parametrize("at", ["body[1]", "output.features['last']", "body.net.5"])
def test_parts_of_nested_outputs_are_compared(at: str) -> None:
    slim = SlimModule(Nested(), recipe(loss("feature-mse", at), label_weight=0))
    x, y = batch()
    apart = Nested().train().net[:6](x) - Nested().eval().net[:6](x)
    assert one_step(slim, (x, y)).item() == pytest.approx(apart.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("output", "at 'output', the student gives an Output of logits, features, not a tensor"),
        ("body", "at 'body', the student gives a tuple of 2, not a tensor: name a part of it"),
        ("output.logit", "'output' gives an Output of logits.* did you mean 'logits'"),
        ("unused", "at 'unused', the student computed nothing: its forward does not call"),
    ],
)
def test_a_place_without_a_tensor_is_said_before_a_weight_changes(at: str, message: str) -> None:
    slim = SlimModule(Nested(), recipe(loss("feature-mse", at)))
    before = copy.deepcopy(slim.network.state_dict())
    with pytest.raises(SlimkitError, match=message):
        fit(slim)
    trained = [k for k, v in slim.network.named_parameters() if not torch.equal(v, before[k])]
    assert trained == []


def test_student_and_teacher_are_compared_at_places_of_their_own() -> None:
    slim = SlimModule(Lit(), recipe(loss("attention", ["net.2", "net.5"]), label_weight=0))
    x, y = batch()
    s, t = Lit().train().net[:3](x), Lit().eval().net[:6](x)
    maps = [(f**2).mean(1).flatten(1) for f in (s, t)]
    maps = [m / m.norm(dim=1, keepdim=True) for m in maps]
    expected = (maps[0] - maps[1]).square().mean().item()
    assert one_step(slim, (x, y)).item() == pytest.approx(expected, rel=1e-4)


def test_a_loss_of_two_places_is_given_pairs() -> None:
    slim = SlimModule(Lit(), recipe(loss("fsp", [["net.2", "net.5"]]), label_weight=0))
    x, y = batch()

    def flow(net: nn.Module) -> Tensor:
        a, b = net[:3](x), net[:6](x)
        return torch.einsum("nahw,nbhw->nab", a, b) / 64

    apart = flow(Lit().train().net) - flow(Lit().eval().net)
    assert one_step(slim, (x, y)).item() == pytest.approx(apart.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("fsp", "net.2", r"compares 2 at once, but 'at' names 1 of the student: write at: \[\["),
        ("kl", [["net.2", "net.5"]], "compares 1 at once.*write one entry for each"),
    ],
)
def test_another_number_of_places_is_refused(name: str, at: Any, message: str) -> None:
    with pytest.raises(SlimkitError, match=message):
        SlimModule(Lit(), recipe(loss(name, at)))


def test_the_same_loss_at_the_same_place_counts_twice() -> None:
    kl = [loss("kl", options={"temperature": t}) for t in (1.0, 4.0)]
    both, first, second = (
        one_step(SlimModule(Lit(), recipe(*some, label_weight=0)), batch()).item()
        for some in (kl, kl[:1], kl[1:])
    )
    assert both == pytest.approx(first + second, rel=1e-5)
    slim = SlimModule(Lit(), recipe(*kl))
    assert {"distill/kl@output", "distill/kl@output#2"} <= set(fit(slim).logged_metrics)


# --- labels -----------------------------------------------------------------------------------


def test_a_loss_that_needs_labels_gets_the_batchs() -> None:
    from slimkit.builtin.losses.dkd import DKD

    slim = SlimModule(Lit(), recipe(loss("dkd"), label_weight=0))
    x, y = batch()
    expected = DKD()(Lit().train()(x), Lit().eval()(x), labels=y).item()
    assert one_step(slim, (x, y)).item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_labels_is_said() -> None:
    class Unlabelled(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch["image"]).square().mean()

    slim = SlimModule(Unlabelled(), recipe(loss("dkd")))
    with pytest.raises(SlimkitError, match="distill: loss 'dkd': labels are needed"):
        one_step(slim, {"image": batch()[0]})


# --- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ({"value": 2, "schedule": "linear", "to": 1}, [2, 1.75, 1.5, 1.25]),
        ({"value": 2, "schedule": "cosine"}, [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)]),
        ({"value": 2, "schedule": "warm-up", "during": [0, 0.5]}, [0, 1, 2, 2]),
        ({"value": 2, "schedule": "decay", "to": 0.125}, [2, 1, 0.5, 0.25]),
        ({"value": 2, "schedule": "decay"}, [2 * 0.01**x for x in (0, 0.25, 0.5, 0.75)]),
        ({"value": 2, "schedule": "linear", "during": [0.5, 0.5]}, [2, 2, 0, 0]),
        ({"value": 2}, [2, 2, 2, 2]),
        (2, [2, 2, 2, 2]),
    ],
)
def test_weights_follow_their_schedule_over_the_training(weight: Any, expected: list) -> None:
    """With a learning rate of 0 the same batches give the same losses."""

    class Same(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum() * 0 + 1.0  # labels' loss: always 1

    seen: list[float] = []
    slim = SlimModule(Same(lr=0.0), recipe(loss("kl", weight=0), label_weight=weight))
    step = slim.training_step

    def looked_at(*args: Any) -> Tensor:
        value = step(*args)
        seen.append(value.item())
        return value

    slim.training_step = looked_at
    fit(slim)  # 4 batches
    assert seen == pytest.approx(expected, rel=1e-5)


def test_a_scheduled_loss_is_weighed_and_logged() -> None:
    fading = {"value": 1.0, "schedule": "linear", "during": [0, 0.75]}
    slim = SlimModule(Lit(), recipe(loss("kl", weight=fading)))
    logged = fit(slim).logged_metrics  # of the last batch, from 0.75 on
    assert logged["distill/weight/kl@output"] == 0
    assert logged["distill/kl@output"] == 0


# --- bad losses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notanumber", "loss 'notanumber' of theirs 1.0 is nan on the first batch at output"),
        ("persample", r"must return a scalar tensor, not a tensor \(8,\)"),
        ("number", "must return a scalar tensor, not 0.5"),
        ("detached", "returned a loss without gradient to the student"),
        ("elsewhere", "returned a loss without gradient to the student"),
    ],
)
def test_a_bad_loss_is_refused_before_a_weight_changes(strangers, name, message) -> None:  # noqa: F811
    slim = SlimModule(Lit(), recipe(loss(name)))
    before = copy.deepcopy(slim.network.state_dict())
    with pytest.raises(PluginError, match=message):
        fit(slim)
    assert all(torch.equal(p, before[n]) for n, p in slim.network.named_parameters())


def test_a_loss_that_needs_what_no_batch_has_is_refused_at_once(strangers: None) -> None:  # noqa: F811
    with pytest.raises(PluginError, match="greedy.*needs images, which no batch has"):
        SlimModule(Lit(), recipe(loss("greedy")))


def test_a_sick_teacher_is_named() -> None:
    lit = Lit()
    with torch.no_grad():
        lit.net[8].bias.fill_(float("nan"))
    slim = SlimModule(lit, recipe(loss("kl")))
    nn.init.zeros_(slim.network.net[8].bias)
    with pytest.raises(PluginError, match="what the teacher gives there is not finite"):
        fit(slim)


def test_a_frozen_place_is_said() -> None:
    lit = Lit()
    lit.net[0].weight.requires_grad_(False)
    slim = SlimModule(lit, recipe(loss("feature-mse", "net.0"), loss("kl")))
    said: list[str] = []
    slim.announce = said.append
    fit(slim)
    assert [line for line in said if "feature-mse@net.0 trains nothing of the student" in line]


# --- losses that learn, and pruning -----------------------------------------------------------

HINT = loss("hint", "net.5", weight=1.0)


def projection(slim: SlimModule) -> nn.Linear:
    return slim.distillation[0].comparisons[0].losses[0].projection


def test_a_projection_is_trained_by_the_same_optimizer() -> None:
    slim = SlimModule(Lit(), recipe(HINT))
    began = []
    trainer = fit(slim, callbacks=[Each(lambda _: began.append(projection(slim).weight.clone()))])
    group = trainer.optimizers[0].param_groups[-1]
    assert {id(p) for p in group["params"]} == {id(p) for p in projection(slim).parameters()}
    assert group["weight_decay"] == 1e-2
    assert not torch.equal(began[0], torch.eye(12))
    assert not torch.equal(began[0], began[-1])
    assert list(slim.state_dict()) == [f"inner.{k}" for k in Lit().state_dict()]


def test_a_projections_step_is_that_of_a_loop_written_by_hand() -> None:
    slim = SlimModule(Lit(), recipe(HINT, label_weight=0))
    fit(slim, limit_train_batches=1)
    x, _ = batch()
    layer = nn.Linear(12, 12)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    s, t = Lit().train().net[:6](x).movedim(1, -1), Lit().eval().net[:6](x).movedim(1, -1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    functional.mse_loss(layer(s), t.detach()).backward()
    optimizer.step()
    torch.testing.assert_close(projection(slim).weight, layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_projection_is_cut_in_step_with_the_students_channels(optimizer: str) -> None:
    slim = SlimModule(Lit(optimizer=optimizer), recipe(HINT, prune=True))
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}

    def look(trainer: pl.Trainer, into: dict[str, Any]) -> None:
        weight = projection(slim).weight
        state = trainer.optimizers[0].state[weight]
        into["weight"] = weight.detach().clone()
        into["state"] = {k: v.clone() for k, v in state.items() if v.dim()}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if not slim.state.cut:
                look(trainer, before)

        def on_before_zero_grad(self, trainer, *args):
            if slim.state.cut and not after:
                look(trainer, after)

    fit(slim, max_epochs=2, callbacks=[Look()])
    kept = slim.network.slimkit_pruning.kept["net.3.weight"][0]
    assert 0 < len(kept) < 12
    assert torch.equal(after["weight"], before["weight"][:, kept])
    assert before["state"]
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value[:, kept])
    assert projection(slim).in_features == len(kept) == projection(slim).weight.shape[1]


def test_the_cut_changes_no_hint() -> None:
    """Columns that read channels of zeros do not count: the loss is the same before and after."""
    slim = SlimModule(Lit(), {**recipe(HINT), "prune": {**PRUNE, "batchnorm_batches": 0}})
    found: list[tuple[bool, float]] = []
    x, y = batch()

    def look() -> None:
        if not slim.distillation[0].tried:
            return
        distillation = slim.distillation[0]
        with torch.no_grad(), distillation.watching() as caught:
            copy_of = slim.network
            copy_of.eval()
            copy_of(x)
            copy_of.train()
        with torch.no_grad():
            found.append((slim.state.cut, distillation.losses_of(caught, (x, y))["hint@net.5"]))

    slim.on_train_batch_start = lambda *args: look()  # after the callbacks
    slim.on_train_batch_end = lambda *args: look()
    fit(slim, max_epochs=2)
    last = max(i for i, (cut, _) in enumerate(found) if not cut)
    assert found[last + 1][0]
    assert float(found[last + 1][1]) == pytest.approx(float(found[last][1]), rel=1e-5)


def test_a_strangers_parameters_over_channels_are_cut_too(strangers: None) -> None:  # noqa: F811
    slim = SlimModule(Lit(), recipe(loss("scaled", "net.5"), prune=True))
    fit(slim, max_epochs=2)
    (scaled,) = slim.distillation[0].comparisons[0].losses
    assert scaled.scale.shape == (slim.network.net[3].out_channels,)
    assert len(scaled.scale) < 12


def test_parameters_begin_anew_where_the_channels_cannot_be_told(monkeypatch) -> None:
    def fail(*args: Any) -> None:
        raise SlimkitError("which channels the cut left cannot be told")

    slim = SlimModule(Lit(optimizer="adamw"), recipe(HINT, prune=True))
    said: list[str] = []
    slim.announce = said.append
    monkeypatch.setattr("slimkit.training.learning.kept_channels", fail)
    trainer = fit(slim, max_epochs=2)
    assert any("hint@net.5 begins anew after the cut" in line for line in said)
    width = slim.network.net[3].out_channels
    assert projection(slim).weight.shape == (12, width)
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {
        id(p) for p in [*slim.network.parameters(), *projection(slim).parameters()]
    }
    assert trainer.optimizers[0].state[projection(slim).weight]["exp_avg"].shape == (12, width)


@pytest.mark.parametrize("name", ["feature-mse", "cosine", "cwd"])
def test_features_that_pruning_would_break_are_said_before_training(name: str) -> None:
    slim = SlimModule(Lit(), recipe(loss(name, "net.5"), prune=True))
    before = copy.deepcopy(slim.network.state_dict())
    message = rf"loss '{name}' at net.5 could not be computed once channels.*protect this layer"
    with pytest.raises(SlimkitError, match=message):
        fit(slim)
    assert all(torch.equal(p, before[n]) for n, p in slim.network.named_parameters())


def test_features_of_protected_layers_are_compared_throughout() -> None:
    given = recipe(loss("feature-mse", "net.5"), prune=True)
    slim = SlimModule(Lit(), {**given, "prune": {**PRUNE, "protect": ["net.3"]}})
    fit(slim, max_epochs=2)
    assert slim.state.cut
    assert slim.network.net[3].out_channels == 12


@pytest.mark.parametrize("name", ["attention", "similarity", "rkd", "pkt", "crd", "hint"])
def test_losses_that_need_no_width_live_through_pruning(name: str) -> None:
    slim = SlimModule(Lit(), recipe(loss(name, "net.5"), prune=True))
    trainer = fit(slim, max_epochs=2)
    assert slim.network.net[3].out_channels < 12
    assert torch.isfinite(trainer.logged_metrics[f"distill/{name}@net.5"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_with_a_projection_ends_bit_equal(
    tmp_path: Path, epoch: int, optimizer: str
) -> None:
    given = recipe(HINT, loss("kl", weight={"value": 1, "schedule": "cosine"}), prune=True)
    given["quantize"] = {"train_from": 0.7, "activations": "lsq", "weights": "lsq"}
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = SlimModule(Lit(optimizer=optimizer), given)
    fit(whole, max_epochs=4, callbacks=[keep])
    resumed = SlimModule(Lit(optimizer=optimizer), given)
    fit(resumed, max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    expected = {**whole.state_dict(), "projection": projection(whole).weight}
    found = {**resumed.state_dict(), "projection": projection(resumed).weight}
    assert list(found) == list(expected)
    assert [k for k, v in found.items() if not torch.equal(v, expected[k])] == []
    assert projection(whole).weight.shape[1] < 12


def test_a_checkpoint_of_other_losses_is_refused(tmp_path: Path) -> None:
    trainer = fit(SlimModule(Lit(), recipe(loss("kl"), HINT)))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(SlimkitError, match="written with other losses or teachers"):
        fit(SlimModule(Lit(), recipe(loss("kl"))), max_epochs=2, ckpt_path=tmp_path / "two.ckpt")


def test_lightnings_own_average_goes_with_a_loss_that_learns() -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging

    slim = SlimModule(Lit(), recipe(HINT, prune=True))
    fit(slim, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert slim.network.net[3].out_channels < 12
    slim.network.eval()(normal(2, 3, 8, 8))


# --- Lightning's own tools --------------------------------------------------------------------


def test_what_learns_is_trained_after_a_search_for_the_learning_rate(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import LearningRateFinder

    class Searched(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.05

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    slim = SlimModule(Searched(), recipe(HINT, teacher=["dense"]))
    slim.lr = 0.05
    find = LearningRateFinder(num_training_steps=5, update_attr=False)
    trainer = fit(slim, callbacks=[find], default_root_dir=tmp_path)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in projection(slim).parameters()} <= held


def test_a_projection_is_trained_under_bf16_and_accumulation() -> None:
    slim = SlimModule(Lit(), recipe(HINT, loss("kl")))
    trainer = fit(
        slim, precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=0.1, max_epochs=2
    )
    assert trainer.global_step == 4
    assert projection(slim).weight.dtype == torch.float32
    assert not torch.equal(projection(slim).weight, torch.eye(12))


def test_fast_dev_run_goes_through_with_everything_on() -> None:
    given = recipe(HINT, loss("dkd"), prune=True, teacher=["dense", "ema"])
    slim = SlimModule(Lit(), {**given, "quantize": {"train_from": 0.5}})
    fit(slim, fast_dev_run=True)
    assert slim.state.cut


def test_zero_weights_stay_zero_in_the_average_that_teaches() -> None:
    section = {"granularity": "2:4", "during": [0.0, 0.5], "steps": 2}
    slim = SlimModule(Lit(), {**recipe(loss("kl"), teacher="ema"), "prune": section})
    fit(slim, max_epochs=2)
    (average,) = slim.distillation[0].averages
    zeros = slim.network.net[3].weight == 0
    assert zeros.any()
    assert (average.network.net[3].weight[zeros] == 0).all()


# --- a detector -------------------------------------------------------------------------------


class Detector(Lit):
    """As public detectors are: several outputs in a dict, several losses, a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.box_head = nn.Conv2d(12, 4, 1)
            self.class_head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.net[:6](x)  # (n, 12, 8, 8)
        near = self.box_head(features).exp()  # distances to the four sides
        return {"boxes": near.flatten(2).transpose(1, 2), "classes": [self.class_head(features)]}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        out = self(x)
        wanted = functional.one_hot(y, 4).float()[:, :, None, None].expand(-1, -1, 8, 8)
        classes = functional.binary_cross_entropy_with_logits(out["classes"][0], wanted)
        boxes = (out["boxes"] - 2).abs().mean()
        self.log("boxes", boxes)
        return {"loss": classes + boxes, "boxes": boxes.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_boxes", (self(batch[0])["boxes"] - 2).abs().mean())


def test_a_detector_is_pruned_and_learns_boxes_and_classes() -> None:
    from slimkit.builtin.losses.box import overlap

    losses = [
        loss("box", "output.boxes", options={"form": "ltrb"}),
        loss("bce-logits", "output.classes[0]", weight=2.0),
    ]
    slim = SlimModule(Detector(), recipe(*losses, prune=True, label_weight=0))
    x, y = batch()
    student, teacher = Detector().train()(x), Detector().eval()(x)
    corners = [
        torch.cat([-o["boxes"][..., :2], o["boxes"][..., 2:]], -1) for o in (student, teacher)
    ]
    p, q = (o["classes"][0].sigmoid() for o in (teacher, student))
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = (1 - overlap(*corners)).mean() + 2 * divergence.mean()
    slim.log = slim.inner.log = lambda *args, **kwargs: None
    slim.train()
    assert slim.training_step((x, y), 0)["loss"].item() == pytest.approx(expected.item(), rel=1e-3)
    slim = SlimModule(Detector(), recipe(*losses, prune=True))
    logged = fit(slim, max_epochs=2).logged_metrics
    assert slim.network.net[3].out_channels < 12
    assert {"boxes", "distill/box@output.boxes", "distill/bce-logits@output.classes[0]"} <= set(
        logged
    )
