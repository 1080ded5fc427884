"""`SlimModule`: a user's LightningModule goes on working while it is compressed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lit import Batches, Lit, Manual, fit, macs_by_hand, network
from nets import normal
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn

import slimkit
from slimkit import SlimModule
from slimkit.errors import SlimkitError
from slimkit.pruning.cost import size_mb
from slimkit.quantization.fake import QuantizedModel

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # the data is tiny
    "ignore:.*callbacks used to create the checkpoint",  # a resumed run need not keep more of them
)

PRUNE = {
    "round_to": 1,
    "criterion": "l1",
    "target": {"flops": 0.5},
    "during": [0.0, 0.5],
    "steps": 2,
}
QUIET = {"distill": False}


class Each(pl.Callback):
    """Calls a function at the start or end of each training batch."""

    def __init__(self, function, when: str = "end") -> None:
        self.function = function
        setattr(self, f"on_train_batch_{when}", lambda *args: function())


def widths(module: SlimModule) -> tuple[int, int]:
    return module.network.net[0].out_channels, module.network.net[3].out_channels


# --- the wrapped module goes on working -------------------------------------------------------


def test_training_through_slimkit_is_the_users_own_training_to_the_last_bit() -> None:
    alone = Lit()
    plain = fit(copy.deepcopy(alone), max_epochs=2)
    slim = fit(SlimModule(alone, {"quantize": {}, **QUIET}), max_epochs=2)
    state = plain.lightning_module.state_dict()
    assert all(
        torch.equal(v, state[k]) for k, v in slim.lightning_module.inner.state_dict().items()
    )


def test_metrics_that_the_module_logs_are_logged() -> None:
    plain, slim = fit(Lit()), fit(SlimModule(Lit(), {"quantize": {}, **QUIET}))
    assert set(plain.callback_metrics) == {"train_loss", "val_loss", "val_acc"}
    assert {k: float(v) for k, v in slim.callback_metrics.items()} == {
        k: float(v) for k, v in plain.callback_metrics.items()
    }


def test_hooks_run_as_often_and_in_the_same_order() -> None:
    plain, slim = fit(Lit()), fit(SlimModule(Lit(), {"quantize": {}, **QUIET}))
    expected = plain.lightning_module.events
    assert {"setup", "on_train_start", "on_before_optimizer_step", "on_fit_end"} <= set(expected)
    assert slim.lightning_module.inner.events == expected


def test_callbacks_that_the_module_configures_run() -> None:
    assert "callback" in fit(SlimModule(Lit(), {"quantize": {}})).lightning_module.inner.events


def test_hyperparameters_reach_the_logger(tmp_path: Path) -> None:
    slim = SlimModule(Lit(lr=0.125), {"quantize": {}})
    fit(slim, logger=CSVLogger(tmp_path, "", ""))
    assert slim.hparams.lr == 0.125
    assert "lr: 0.125" in (tmp_path / "hparams.yaml").read_text()


def test_logged_values_reach_the_logger(tmp_path: Path) -> None:
    fit(SlimModule(Lit(), {"quantize": {}}), logger=CSVLogger(tmp_path, "", ""))
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_acc", "distill/kl@output"} <= set(header)


def test_attributes_of_the_module_are_found_and_unknown_ones_are_not() -> None:
    slim = SlimModule(Lit(), {"quantize": {}})
    assert slim.val_acc is slim.inner.val_acc
    with pytest.raises(AttributeError):
        _ = slim.no_such_thing


def test_the_given_module_is_untouched() -> None:
    lit = Lit()
    before = {k: v.clone() for k, v in lit.state_dict().items()}
    fit(SlimModule(lit, {"prune": PRUNE, "quantize": {"train_from": 0.5}}), max_epochs=2)
    assert all(torch.equal(v, before[k]) for k, v in lit.state_dict().items())
    assert lit.events == []
    assert lit._trainer is None


def test_manual_optimization_is_left_to_the_module() -> None:
    slim = SlimModule(Manual(), {"prune": PRUNE})
    before = slim.network.net[0].weight.clone()
    said = []
    slim.announce = said.append
    fit(slim, max_epochs=2)
    assert not slim.automatic_optimization
    assert slim.network.net[0].weight.shape != before.shape


def test_a_plain_module_without_a_task_is_refused() -> None:
    with pytest.raises(SlimkitError, match="Sequential is no LightningModule.*task"):
        SlimModule(network(), {"quantize": {}})


def test_a_plain_module_with_a_task_is_trained() -> None:
    net = network()
    slim = SlimModule(net, {"quantize": {}, "task": "classification"})
    trainer = fit(slim, max_epochs=3)
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(trainer.callback_metrics)
    assert not torch.equal(slim.network[0].weight, net[0].weight)


# --- distillation -----------------------------------------------------------------------------


def test_the_teacher_is_not_in_the_state_dict() -> None:
    slim = SlimModule(Lit(), {"quantize": {}})
    assert list(slim.state_dict()) == [f"inner.{k}" for k in Lit().state_dict()]


def step(slim: SlimModule, batch) -> float:
    """The training loss of one batch, outside of a trainer."""
    slim.log = slim.inner.log = lambda *args, **kwargs: None
    slim.train()
    return slim.training_step(batch, 0).item()


def strayed(recipe) -> SlimModule:
    """A student that is no longer its teacher."""
    slim = SlimModule(Lit(), recipe)
    with torch.no_grad():
        for parameter in slim.network.parameters():
            parameter.mul_(1.3)
    return slim


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_distillation_loss_has_the_value_computed_by_hand() -> None:
    losses = [{"name": "kl", "options": {"temperature": 2.0}, "weight": 0.7}]
    slim = strayed({"quantize": {}, "distill": {"losses": losses, "label_weight": 0.25}})
    x, y = Batches().train[:8]
    teacher = Lit().eval()(x).detach().double().numpy() / 2
    student = copy.deepcopy(slim.network).train()(x).detach().double().numpy()
    labels = -log_softmax(student)[np.arange(8), y.numpy()].mean()
    theirs, mine = log_softmax(teacher), log_softmax(student / 2)
    divergence = (np.exp(theirs) * (theirs - mine)).sum(1).mean() * 4
    assert step(slim, (x, y)) == pytest.approx(0.25 * labels + 0.7 * divergence, rel=1e-4)


def test_features_are_compared_where_the_recipe_says() -> None:
    losses = [{"name": "feature-mse", "at": "net.0", "weight": 3.0}]
    slim = strayed({"quantize": {}, "distill": {"losses": losses, "label_weight": 0}})
    x, y = Batches().train[:8]
    difference = slim.network.net[0](x) - Lit().net[0](x)
    assert step(slim, (x, y)) == pytest.approx(3 * difference.square().mean().item(), rel=1e-4)


def test_an_unknown_place_is_said_before_training() -> None:
    losses = [{"name": "feature-mse", "at": "net.00"}]
    with pytest.raises(SlimkitError, match="has no module 'net.00'; did you mean 'net.0'"):
        SlimModule(Lit(), {"quantize": {}, "distill": {"losses": losses}})


# --- pruning ----------------------------------------------------------------------------------


def test_dead_channels_stay_zero_under_momentum_and_weight_decay() -> None:
    slim = SlimModule(Lit(), {"prune": {**PRUNE, "during": [0.0, 1.0], "steps": 8}, **QUIET})
    seen = []

    def look() -> None:
        living = slim.state.living.get("net.0")
        if living is not None and not slim.state.cut:
            dead = [c for c in range(8) if c not in living.tolist()]
            net = slim.network.net
            parts = (net[0].weight[dead], net[1].weight[dead], net[1].bias[dead])
            seen.append(
                (len(dead), [p.abs().sum().item() for p in (*parts, net[3].weight[:, dead])])
            )

    fit(slim, max_epochs=2, callbacks=[Each(look, "start")])
    assert any(count for count, _ in seen)
    assert all(values == [0, 0, 0, 0] for _, values in seen)


def test_channels_are_cut_when_the_window_closes() -> None:
    slim = SlimModule(Lit(), {"prune": PRUNE, **QUIET})
    seen = []
    fit(slim, max_epochs=2, callbacks=[Each(lambda: seen.append(widths(slim) == (8, 12)))])
    assert seen == [True] * 4 + [False] * 4  # of 8 batches, the window has half


def test_a_window_to_the_very_end_is_cut_too() -> None:
    slim = SlimModule(Lit(), {"prune": {**PRUNE, "during": [0.5, 1.0]}, **QUIET})
    fit(slim)
    assert slim.state.cut
    assert widths(slim) != (8, 12)


@pytest.mark.parametrize(
    "criterion", ["l1", "taylor", "hessian", "activation", "wanda", "bn-scale"]
)
def test_the_target_is_reached_by_a_count_of_its_own(criterion: str) -> None:
    slim = SlimModule(Lit(), {"prune": {**PRUNE, "criterion": criterion}, **QUIET})
    fit(slim, max_epochs=2)
    ratio = macs_by_hand(slim.network.net) / macs_by_hand(network())
    assert 0.4 < ratio <= 0.5
    assert slim.state.macs_left == pytest.approx(ratio, abs=1e-6)


def scheduled(prune: dict, **options) -> SlimModule:
    """A module after two epochs of pruning in four steps."""
    slim = SlimModule(Lit(**options), {"prune": {**PRUNE, "steps": 4, **prune}, **QUIET})
    fit(slim, max_epochs=2)
    return slim


@pytest.mark.parametrize("ranking", ["global", "local", "isomorphic"])
def test_a_size_is_reached_in_training(ranking: str) -> None:
    limit = 0.6 * size_mb(Lit())
    slim = scheduled({"target": {"size_mb": limit}, "ranking": ranking})
    assert 0.4 * size_mb(Lit()) < size_mb(slim.network) <= limit


def test_ratios_are_reached_in_training_without_a_target() -> None:
    slim = scheduled({"target": None, "ratios": {"net.3": 0.5, "net": 0.25}})
    assert widths(slim) == (6, 6)


def test_max_ratio_holds_in_training() -> None:
    assert widths(scheduled({"target": {"ratio": 0.5}, "max_ratio": [0.25, 0.5]})) == (6, 6)


def test_ratios_grow_along_the_schedule() -> None:
    prune = {**PRUNE, "target": None, "ratios": {"net.0": 0.5}, "schedule": "linear"}
    slim = SlimModule(Lit(), {"prune": prune, **QUIET})
    seen = []
    look = Each(lambda: seen.append(len(slim.state.living.get("net.0", range(8)))))
    fit(slim, max_epochs=2, callbacks=[look])
    # two steps in the first half of eight batches, each seen a batch later
    assert seen == [8, 8, 6, 6, 4, 4, 4, 4]


def test_importance_lost_over_the_steps_is_that_of_one_step() -> None:
    # without learning, scores of a layer stay the same; its neighbour is left alone
    prune = {"target": {"importance": 0.7}, "protect": ["net.3"]}
    slim = scheduled(prune, lr=0.0)
    once = slimkit.prune(network(), normal(1, 3, 8, 8), target=prune["target"], protect=["3"])
    assert slim.network.net[0].out_channels == once[0].out_channels < 8


@pytest.mark.parametrize("epoch", [0, 1])
def test_importance_is_remembered_in_a_checkpoint(tmp_path: Path, epoch: int) -> None:
    recipe = {"prune": {"target": {"importance": 0.7}, "during": [0.0, 0.8]}, **QUIET}
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = SlimModule(Lit(), recipe), SlimModule(Lit(), recipe)
    fit(whole, max_epochs=3, callbacks=[keep])
    fit(resumed, max_epochs=3, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert resumed.state.carried == whole.state.carried
    assert widths(resumed) == widths(whole) != (8, 12)


def test_a_pattern_that_names_no_layer_is_said_before_training() -> None:
    slim = SlimModule(Lit(), {"prune": {**PRUNE, "ratios": {"nett.0": 0.5}}, **QUIET})
    with pytest.raises(SlimkitError, match="ratios: no layer of the model is called 'nett.0'"):
        fit(slim)


def test_the_cut_changes_no_output() -> None:
    slim = SlimModule(Lit(), {"prune": {**PRUNE, "batchnorm_batches": 0}, **QUIET})
    x = normal(4, 3, 8, 8)
    before, after = [], []

    def look(outs: list) -> None:
        outs.append((widths(slim), copy.deepcopy(slim.network).eval()(x)))

    slim.on_train_batch_start = lambda *args: look(after)  # Lightning calls it after the callbacks
    fit(slim, max_epochs=2, callbacks=[Each(lambda: look(before), "start")])
    ((old, new),) = [(b[1], a[1]) for b, a in zip(before, after, strict=True) if b[0] != a[0]]
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        ("sgd", {"momentum_buffer"}),
        ("adamw", {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    ],
)
def test_optimizer_state_of_kept_channels_is_bit_equal_over_the_cut(optimizer: str, keys) -> None:
    slim = SlimModule(Lit(optimizer=optimizer), {"prune": PRUNE, **QUIET})
    found = {}

    def snapshot(trainer) -> dict[str, dict[str, torch.Tensor]]:
        (optimizer,) = trainer.optimizers
        names = dict(slim.network.named_parameters())
        return {n: copy.deepcopy(optimizer.state.get(p, {})) for n, p in names.items()}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if not slim.state.cut:
                found["before"] = snapshot(trainer)

        def on_before_zero_grad(self, trainer, *args):
            if slim.state.cut and "after" not in found:
                found["after"] = snapshot(trainer)

    trainer = fit(slim, max_epochs=2, callbacks=[Look()])
    kept = slim.network.slimkit_pruning.kept
    assert kept
    for name, state in found["after"].items():
        assert keys <= set(state)
        for key in keys:
            expected = found["before"][name][key].numpy()
            for dim, positions in kept.get(name, {}).items():
                expected = np.take(expected, positions, dim)
            np.testing.assert_array_equal(state[key].numpy(), expected)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in slim.network.parameters()}


def test_momenta_of_a_network_that_was_pruned_before_are_cut_where_it_is() -> None:
    """Not where the first dense network was: the report counts from there."""
    once = slimkit.prune(
        network(2), normal(1, 3, 8, 8), "random", target={"ratio": 0.25}, round_to=1
    )
    earlier = once.slimkit_pruning.kept
    slim = SlimModule(once, {"task": "classification", "prune": PRUNE, **QUIET})
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if not slim.state.cut:
                for name, p in slim.network.named_parameters():
                    state = trainer.optimizers[0].state.get(p, {})
                    before[name] = state.get("momentum_buffer", torch.zeros_like(p)).clone()

        def on_before_zero_grad(self, trainer, *args):
            if slim.state.cut and not after:
                for name, p in slim.network.named_parameters():
                    after[name] = trainer.optimizers[0].state[p]["momentum_buffer"].clone()

    fit(slim, max_epochs=2, callbacks=[Look()])
    kept = slim.network.slimkit_pruning.kept["3.weight"]
    expected = before["3.weight"]
    for dim, positions in kept.items():
        then = earlier["3.weight"].get(dim)
        now = positions if then is None else [then.index(position) for position in positions]
        expected = expected.index_select(dim, torch.tensor(now))
    assert expected.shape < before["3.weight"].shape
    assert torch.equal(after["3.weight"], expected)


def test_batch_norm_statistics_settle_over_the_batches_after_the_cut() -> None:
    slim = SlimModule(Lit(), {"prune": {**PRUNE, "batchnorm_batches": 3}, **QUIET})
    means = []

    def look(module, args) -> None:
        if module.training and torch.is_grad_enabled() and slim.state.cut and len(means) < 3:
            means.append(args[0].detach().mean((0, 2, 3)))

    slim.network.net[1].register_forward_pre_hook(look)
    after_three = []

    def grab() -> None:
        if len(means) == 3 and not after_three:
            after_three.append(slim.network.net[1].running_mean.clone())

    fit(slim, max_epochs=2, callbacks=[Each(grab)])
    torch.testing.assert_close(after_three[0], torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
    assert slim.network.net[1].momentum == 0.1


def test_a_loss_that_somebody_keeps_does_not_disturb_the_cut() -> None:
    kept = []

    class Keeping(Lit):
        def training_step(self, batch, batch_idx):
            kept.append(super().training_step(batch, batch_idx))  # with its graph
            return kept[-1]

    slim = SlimModule(Keeping(), {"prune": PRUNE, **QUIET})
    trainer = fit(slim, max_epochs=2)
    assert slim.state.cut
    assert trainer.global_step == 8


def test_nothing_to_prune_is_an_error() -> None:
    with pytest.raises(SlimkitError, match="nothing can be pruned.*protected by 'net\\*'"):
        fit(SlimModule(Lit(), {"prune": {**PRUNE, "protect": ["net*"]}, **QUIET}))


# --- quantization-aware training --------------------------------------------------------------

QAT = {"quantize": {"train_from": 0.5, "activations": "minmax"}, **QUIET}


def test_rounding_is_on_from_train_from_after_one_batch_of_ranges() -> None:
    slim = SlimModule(Lit(), QAT)
    seen = []
    fit(slim, max_epochs=2, callbacks=[Each(lambda: seen.append(slim.fake and slim.fake.state))])
    assert seen == [None] * 4 + ["observe"] + ["quantize"] * 3


def test_training_and_validation_compute_on_the_simulation() -> None:
    slim = SlimModule(Lit(), QAT)
    fit(slim, max_epochs=2)
    x = Batches().val[:][0]
    simulation = QuantizedModel(slim.network, slim.fake, "onnxruntime").eval()
    assert torch.equal(slim.inner.last_validation, simulation(x))
    assert not torch.equal(slim.inner.last_validation, slim.network.eval()(x))


def test_ranges_are_those_of_training_batches_only() -> None:
    loud = Batches()
    loud.val = torch.utils.data.TensorDataset(1e6 * loud.val[:][0], loud.val[:][1])
    recipe = {"quantize": {"train_from": 0.43, "activations": "minmax"}, **QUIET}
    slim = SlimModule(Lit(), recipe)
    fit(slim, loud, max_epochs=4)  # observes batches 7 and 8 of 16: over an epoch's end
    assert slim.fake.state == "quantize"
    scale, _ = slim.fake["input0"].qparams()
    assert scale.item() < 1


def test_distillation_of_an_unhooked_forward_learns_from_the_simulation() -> None:
    class Around(Lit):
        """Its steps call a part of the module, not the module."""

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    losses = [{"name": "kl", "options": {"temperature": 1.0}}]
    slim = SlimModule(Around(), {"quantize": QAT["quantize"], "distill": {"losses": losses}})
    fit(slim, max_epochs=2)
    slim.distillation[0].recipe = slim.distillation[0].recipe.model_copy(
        update={"label_weight": 0.0}
    )
    slim.network.eval()  # no batch statistics: student and simulation see the same
    slim.log = slim.inner.log = lambda *args, **kwargs: None
    x, y = Batches().train[:8]
    loss = slim.training_step((x, y), 0).item()
    student = QuantizedModel(slim.network, slim.fake, "")(x).log_softmax(1)
    teacher = slim.dense(x).log_softmax(1)
    expected = (teacher.exp() * (teacher - student)).sum(1).mean().item()
    assert loss == pytest.approx(expected, rel=1e-4)


# --- going on from a checkpoint ---------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("epoch", "where"), [(0, "in pruning"), (1, "before the cut"), (2, "settling"), (3, "in QAT")]
)
@pytest.mark.parametrize("criterion", ["l1", "taylor", "hessian", "activation"])
def test_a_resumed_run_ends_bit_equal(
    tmp_path: Path, epoch: int, where: str, criterion: str, optimizer: str
) -> None:
    recipe = {
        "prune": {
            "criterion": criterion,
            "target": {"flops": 0.5},
            "during": [0.0, 0.375],  # of 20 batches: cut after the second epoch
            "steps": 5,
            "batchnorm_batches": 6,  # over the third epoch's end
        },
        "quantize": {"train_from": 0.7, "activations": "minmax"},
    }
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = SlimModule(Lit(optimizer=optimizer), recipe)
    fit(whole, max_epochs=5, callbacks=[keep])
    resumed = SlimModule(Lit(optimizer=optimizer), recipe)
    fit(resumed, max_epochs=5, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert widths(resumed) == widths(whole) != (8, 12)
    expected = whole.state_dict()
    assert list(resumed.state_dict()) == list(expected)
    different = [k for k, v in resumed.state_dict().items() if not torch.equal(v, expected[k])]
    assert different == []


def test_a_checkpoint_of_the_very_end_is_cut_though_no_batch_is_left(tmp_path: Path) -> None:
    recipe = {"prune": {**PRUNE, "during": [0.0, 1.0]}, **QUIET}
    keep = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    whole, resumed = SlimModule(Lit(), recipe), SlimModule(Lit(), recipe)
    fit(whole, max_epochs=2, callbacks=[keep])
    fit(resumed, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert widths(resumed) == widths(whole) != (8, 12)


def test_a_checkpoint_of_the_module_alone_is_refused(tmp_path: Path) -> None:
    trainer = fit(Lit())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(SlimkitError, match="not written by a SlimModule"):
        fit(SlimModule(Lit(), {"quantize": {}}), ckpt_path=tmp_path / "plain.ckpt")


# --- the trainer's other ways -----------------------------------------------------------------


def test_fast_dev_run_prunes_and_ends() -> None:
    slim = SlimModule(Lit(), {"prune": PRUNE, "quantize": {"train_from": 0.5}})
    fit(slim, fast_dev_run=True)
    assert slim.state.cut


def test_a_run_without_known_length_is_refused() -> None:
    with pytest.raises(SlimkitError, match="needs a training of known length"):
        fit(SlimModule(Lit(), {"prune": PRUNE}), max_epochs=-1, max_time={"seconds": 10})


def test_max_steps_are_the_timelines_length_too() -> None:
    slim = SlimModule(Lit(), {"prune": PRUNE, **QUIET})
    seen = []
    fit(slim, max_epochs=100, max_steps=8, callbacks=[Each(lambda: seen.append(slim.state.cut))])
    assert seen == [False] * 4 + [True] * 4


@pytest.mark.parametrize("pass_data", [True, False])
def test_export_through_the_trainer_makes_an_artifact_that_loads(tmp_path, pass_data) -> None:
    recipe = {
        "prune": PRUNE,
        "quantize": {"train_from": 0.5, "activations": "minmax"},
        "export": ["torch"],
    }
    slim = SlimModule(Lit(wide=12), recipe)
    data = Batches()
    fit(slim, data, max_epochs=2)
    release = slim.export(tmp_path / "small", data if pass_data else None)
    assert [row.stage for row in release.rows] == ["dense", "compressed", "int8"]
    assert release.metric.name == "val_acc"
    loaded = slimkit.load(tmp_path / "small", lambda: Lit(wide=12))
    x = normal(4, 3, 8, 8)
    assert torch.equal(loaded(x), QuantizedModel(slim.network, slim.fake, "").eval()(x))


def test_export_before_any_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimkitError, match="has not been pruned yet"):
        SlimModule(Lit(), {"prune": PRUNE}).export(tmp_path / "small", Batches())


def test_export_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimkitError, match="pass your datamodule"):
        SlimModule(Lit(), {"quantize": {}}).export(tmp_path / "small")
