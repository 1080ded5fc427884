"""Regularizers, schedules, windows in steps and averaged weights, in a Lightning fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lit import Lit, Manual, fit
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from slimkit import SlimModule
from slimkit.errors import SlimkitError
from slimkit.training.window import PruningCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # the data is tiny
    "ignore:.*callbacks used to create the checkpoint",  # a resumed run need not keep more of them
    "ignore:.*Swapping scheduler",  # stochastic weight averaging brings its own
    "ignore:.*lr_scheduler.step",
)

KINDS = ["bn-scale", "group-lasso", "growing"]


def recipe(**prune) -> dict:
    section = {"round_to": 1, "target": {"ratio": 0.5}, "protect_first": False, "steps": 4}
    return {"prune": {**section, "during": [0.25, 0.75], **prune}, "distill": False}


def widths(module: SlimModule) -> tuple[int, int]:
    return module.network.net[0].out_channels, module.network.net[3].out_channels


class Gradients(pl.Callback):
    """Keeps each parameter's gradient as it is at the optimizer's step, and the one before."""

    def __init__(self, slim: SlimModule) -> None:
        self.slim, self.losses, self.sums, self.weights = slim, [], [], []

    def named(self):
        return {n: p for n, p in self.slim.network.named_parameters() if p.grad is not None}

    def on_before_optimizer_step(self, *args) -> None:  # in front of slimkit's callback
        self.losses.append({n: p.grad.clone() for n, p in self.named().items()})
        self.weights.append({n: p.detach().clone() for n, p in self.named().items()})

    def on_train_batch_end(self, *args) -> None:
        if len(self.sums) < len(self.losses):
            self.sums.append({n: p.grad.clone() for n, p in self.named().items()})

    def differences(self):
        pairs = zip(self.sums, self.losses, strict=False)
        return [
            {n: with_[n] - loss[n] for n in with_ if with_[n].shape == loss[n].shape}
            for with_, loss in pairs
        ]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bn_scale_adds_the_sign_of_gamma_once_a_step(accumulated: int, precision: str) -> None:
    slim = SlimModule(Lit(), recipe(regularizer={"name": "bn-scale", "strength": 0.5}))
    look = Gradients(slim)
    options = {"accumulate_grad_batches": accumulated, "precision": precision}
    fit(slim, max_epochs=2, callbacks=[look], **options)
    assert len(look.differences()) >= 3
    difference, weights = look.differences()[0], look.weights[0]
    for name in ("net.1.weight", "net.4.weight"):
        torch.testing.assert_close(difference[name], 0.5 * weights[name].sign())
    assert {n for n, d in difference.items() if d.any()} == {"net.1.weight", "net.4.weight"}
    assert not any(d.any() for d in look.differences()[-1].values())  # after the cut


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_cannot_be_pruned_are_left_alone(kind: str) -> None:
    slim = SlimModule(Lit(), recipe(regularizer=kind, protect=["net.3"], schedule="one-shot"))
    look = Gradients(slim)
    fit(slim, max_epochs=2, callbacks=[look])
    touched = {n for d in look.differences() for n, x in d.items() if x.any()}
    own = {"net.1.weight"} if kind == "bn-scale" else {"net.0.weight", "net.3.weight"}
    assert touched == own


def test_the_first_layer_is_left_alone_where_it_is_protected() -> None:
    slim = SlimModule(Lit(), recipe(regularizer="group-lasso", ratios={"net.3": 0.5}, target=None))
    look = Gradients(slim)
    fit(slim, max_epochs=2, callbacks=[look])
    touched = {n for d in look.differences() for n, x in d.items() if x.any()}
    assert touched == {"net.3.weight", "net.8.weight"}


def test_growing_grows_step_by_step_on_what_is_then_removed() -> None:
    slim = SlimModule(Lit(), recipe(regularizer="growing", schedule="one-shot", steps=2))
    look = Gradients(slim)
    fit(slim, max_epochs=2, callbacks=[look])
    kept = slim.network.slimkit_pruning.kept["net.0.weight"][0]
    factors = []
    for difference, weights in zip(look.differences(), look.weights, strict=False):
        if difference.get("net.0.weight") is None or len(weights["net.0.weight"]) < 8:
            break
        rows = difference["net.0.weight"].flatten(1), weights["net.0.weight"].flatten(1)
        assert not rows[0][kept].any()
        factors.append((rows[0] / rows[1]).amax().item())
    # the window has batches 2 to 5 of 8
    assert factors == pytest.approx([0, 0, 0.5, 0.5, 1.0, 1.0], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "strength"), [("bn-scale", 0.3), ("group-lasso", 0.3), ("growing", 3.0)]
)
def test_a_regularizer_makes_small_what_is_removed(kind: str, strength: float) -> None:
    def removed(**more) -> float:
        """How large the six weakest channels of `net.3` are in front of the cut."""
        slim = SlimModule(Lit(), recipe(schedule="one-shot", during=[0.0, 0.9], **more))
        norms = []

        class Look(pl.Callback):
            def on_train_batch_end(self, *args) -> None:
                net = slim.network.net
                if not slim.state.cut:
                    made = net[4].weight if kind == "bn-scale" else net[8].weight.norm(dim=0)
                    norms.append(made.detach().abs().sort().values[:6].sum().item())

        fit(slim, max_epochs=6, callbacks=[Look()])
        return norms[-1]

    assert removed(regularizer={"name": kind, "strength": strength}) < 0.5 * removed()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["bn-scale", "taylor", "hessian"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_ends_bit_equal(
    tmp_path: Path, kind: str, criterion: str, epoch: int
) -> None:
    what = recipe(regularizer=kind, criterion=criterion)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = SlimModule(Lit(), what), SlimModule(Lit(), what)
    fit(whole, max_epochs=4, callbacks=[keep])
    fit(resumed, max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert widths(resumed) == widths(whole) == (4, 6)
    expected = whole.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.state_dict().items())


def test_a_criterion_sees_the_gradient_of_the_loss_alone() -> None:
    def scores(**more) -> list[torch.Tensor]:
        what = recipe(criterion="taylor", schedule="one-shot", during=[0.0, 0.75], **more)
        slim = SlimModule(Lit(lr=0.0), what)  # weights stay: scores depend on gradients only
        found = []

        class Look(pl.Callback):
            def on_train_batch_start(self, trainer, *args) -> None:
                (callback,) = [c for c in trainer.callbacks if isinstance(c, PruningCallback)]
                found.extend(score.clone() for score in callback._scores.values())

        fit(slim, max_epochs=2, callbacks=[Look()])
        return found

    plain, regularized = scores(), scores(regularizer={"name": "group-lasso", "strength": 1e3})
    assert len(plain) == 2 * 5
    torch.testing.assert_close(regularized, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_and_rounding_go_with_it(kind: str) -> None:
    what = {**recipe(regularizer=kind, during=[0.0, 0.5]), "quantize": {"train_from": 0.5}}
    del what["distill"]
    slim = SlimModule(Lit(), what)
    fit(slim, max_epochs=3)
    assert slim.fake.state == "quantize"
    assert widths(slim) == (4, 6)


def test_manual_optimization_is_regularized_too() -> None:
    slim = SlimModule(Manual(), recipe(regularizer={"name": "bn-scale", "strength": 0.5}))
    look = Gradients(slim)
    fit(slim, max_epochs=2, callbacks=[look])
    assert widths(slim) == (4, 6)


# --- windows and schedules --------------------------------------------------------------------


def channels_by_batch(what, **options) -> list[int]:
    slim = SlimModule(Lit(), what)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args) -> None:  # in front of slimkit's callback
            seen.append(len(slim.state.living.get("net.0", range(8))))

    fit(slim, max_epochs=2, callbacks=[Look()], **options)
    return seen


def test_a_window_in_steps_is_the_same_window_in_fractions() -> None:
    by_fraction = channels_by_batch(recipe(during=[0.25, 0.75], steps=2, schedule="linear"))
    by_steps = channels_by_batch(recipe(during=[2, 6], steps=2, schedule="linear"))
    assert by_steps == by_fraction == [8, 8, 8, 8, 6, 6, 4, 4]


def test_steps_are_the_optimizers() -> None:
    # four batches an epoch and three a step: steps end with batches 3, 4, 7 and 8
    what = recipe(during=[0.0, 2], steps=1)
    assert channels_by_batch(what, accumulate_grad_batches=3) == [8] * 4 + [4] * 4


def test_iterative_removes_the_same_fraction_of_what_is_left_at_each_step() -> None:
    what = recipe(during=[0.0, 0.5], steps=2, schedule="iterative", target={"ratio": 0.75})
    assert channels_by_batch(what) == [8, 8, 4, 4, 2, 2, 2, 2]


def test_a_window_that_ends_after_training_is_one_error_before_it() -> None:
    slim = SlimModule(Lit(), recipe(during=[0.0, 9]))
    before = {k: v.clone() for k, v in slim.state_dict().items()}
    with pytest.raises(
        SlimkitError, match="prune.during: ends at step 9, but .* has only 8: train"
    ):
        fit(slim, max_epochs=2)
    assert all(torch.equal(v, before[k]) for k, v in slim.state_dict().items())


def test_a_window_that_begins_after_its_end_is_said_before_training() -> None:
    with pytest.raises(SlimkitError, match="0.9 is 90.0% of this training and 4 is 50.0%"):
        fit(SlimModule(Lit(), recipe(during=[0.9, 4])), max_epochs=2)


def test_rounding_before_the_end_of_a_window_in_steps_is_said_before_training() -> None:
    what = {**recipe(during=[0.0, 6]), "quantize": {"train_from": 0.5}}
    with pytest.raises(SlimkitError, match="quantize.train_from: .* step 6 or 0.75 of this"):
        fit(SlimModule(Lit(), what), max_epochs=2)


# --- averaged weights -------------------------------------------------------------------------


def average_of(trainer) -> torch.nn.Module:
    (callback,) = [c for c in trainer.callbacks if hasattr(c, "_average_model")]
    average = callback._average_model
    return getattr(average, "module", average).network


@pytest.mark.parametrize("end", [0.75, 1.0])
def test_dead_channels_are_zero_in_an_average_and_cut_from_it(end: float) -> None:
    slim = SlimModule(Lit(), recipe(during=[0.0, end]))
    dead_weights = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            living = slim.state.living.get("net.0")
            if living is not None and len(living) < 8 and not slim.state.cut:
                dead = [c for c in range(8) if c not in living.tolist()]
                net = average_of(trainer).net
                dead_weights.extend([net[0].weight[dead], net[1].weight[dead]])
                dead_weights.append(net[3].weight[:, dead])

    trainer = fit(slim, max_epochs=4, callbacks=[EMAWeightAveraging(decay=0.5), Look()])
    assert len(dead_weights) > 3
    assert not any(w.any() for w in dead_weights)
    assert widths(slim) == (4, 6)
    average = average_of(trainer)
    assert average.net[0].out_channels == 4
    expected = slim.network.state_dict()  # Lightning copies the average at the end
    if end < 1:
        assert all(torch.equal(v, expected[k]) for k, v in average.state_dict().items())


def test_the_average_of_a_pruned_run_is_resumed(tmp_path: Path) -> None:
    what = recipe(during=[0.0, 0.4])
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = SlimModule(Lit(), what), SlimModule(Lit(), what)
    fit(whole, max_epochs=4, callbacks=[EMAWeightAveraging(decay=0.5), keep])
    options = {"ckpt_path": tmp_path / "epoch=2.ckpt"}
    fit(resumed, max_epochs=4, callbacks=[EMAWeightAveraging(decay=0.5)], **options)
    expected = whole.state_dict()
    assert widths(resumed) == (4, 6)
    assert all(torch.equal(v, expected[k]) for k, v in resumed.state_dict().items())


def test_stochastic_weight_averaging_goes_on_over_the_cut() -> None:
    slim = SlimModule(Lit(), recipe(during=[0.0, 0.6]))
    fit(slim, max_epochs=4, callbacks=[StochasticWeightAveraging(1e-2, swa_epoch_start=0.5)])
    assert widths(slim) == (4, 6)


# --- following --------------------------------------------------------------------------------


def test_sparsity_and_macs_are_logged_at_each_update(tmp_path: Path) -> None:
    slim = SlimModule(Lit(), recipe(schedule="linear"))
    fit(slim, max_epochs=2, logger=CSVLogger(tmp_path, "", ""))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    values = [
        dict(zip(columns, row.split(","), strict=True))["slimkit/sparsity/net.0"] for row in rows
    ]
    assert [float(v) for v in values if v] == [0.125, 0.25, 0.375, 0.5]
    assert "slimkit/macs_left" in columns


def test_gammas_are_shown_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    slim = SlimModule(Lit(), recipe())
    fit(slim, max_epochs=2, logger=TensorBoardLogger(tmp_path, "", ""))
    events = EventAccumulator(str(tmp_path), {"histograms": 0})
    events.Reload()
    assert events.Tags()["histograms"] == ["slimkit/gamma/net.1", "slimkit/gamma/net.4"]
    assert len(events.Histograms("slimkit/gamma/net.1")) == 4


def test_each_update_is_one_line_in_the_terminal() -> None:
    slim = SlimModule(Lit(), recipe(schedule="linear", steps=2))
    said = []
    slim.announce = said.append
    fit(slim, max_epochs=2)
    lines = [line for line in said if "masked" in line]
    assert len(lines) == 2
    assert "masked 10 of 20 channels, step 2 of 2: " in lines[1]
