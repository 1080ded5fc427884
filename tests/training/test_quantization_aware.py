"""Quantization-aware training: learned ranges, freezing, schedulers, resuming, export."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit import Batches, Lit, fit
from nets import normal
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
)
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler

import slimkit
from slimkit import SlimModule
from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.errors import QuantizationError, RecipeError, SlimkitError
from slimkit.interfaces import Scheme
from slimkit.quantization.fake import QuantizedModel
from slimkit.recipe import PluginRef, Recipe
from slimkit.registry import discover
from slimkit.training.averages import copies_of
from slimkit.training.quantization import scheme_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # the data is tiny
    "ignore:.*callbacks used to create the checkpoint",  # a resumed run need not keep more of them
)

LSQ = {"train_from": 0.25, "weights": "lsq", "activations": "lsq"}


def slim(quantize: dict[str, Any], lit: Lit | None = None, **recipe: Any) -> SlimModule:
    module = SlimModule(lit or Lit(), {"quantize": quantize, "distill": False, **recipe})
    module.announce = lambda line: None
    return module


class Look(pl.Callback):
    """Calls a function after each training batch, and keeps what it gives."""

    def __init__(self, function) -> None:
        self.function = function
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        self.seen.append(self.function(trainer))


def scale(module: SlimModule, name: str) -> float:
    return module.fake[name].qparams()[0][0].item()


# --- the optimizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lsq", "pact"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learned_ranges_get_a_group_of_their_own_when_rounding_begins(
    name: str, optimizer: str
) -> None:
    options = {"train_from": 0.5, "learning_rate_scale": 0.25}
    module = slim({**options, "weights": name, "activations": name}, Lit(optimizer=optimizer))
    look = Look(lambda trainer: len(trainer.optimizers[0].param_groups))
    trainer = fit(module, max_epochs=2, callbacks=[look])
    assert look.seen == [1] * 5 + [2] * 3  # of 8 batches, one gives the ranges
    ours, theirs = trainer.optimizers[0].param_groups[::-1]
    assert {id(p) for p in ours["params"]} == {id(p) for p in module.fake.parameters()}
    assert ours["weight_decay"] == 0 < theirs["weight_decay"]
    assert ours["lr"] == 0.25 * theirs["lr"]
    assert {k for k in theirs if k not in ours} == set()


def test_ranges_without_parameters_need_no_group() -> None:
    trainer = fit(slim({"train_from": 0.5}), max_epochs=2)
    assert len(trainer.optimizers[0].param_groups) == 1


def test_weight_decay_of_learned_ranges_is_the_recipes() -> None:
    module = slim({**LSQ, "weight_decay": 0.125})
    assert fit(module, max_epochs=2).optimizers[0].param_groups[1]["weight_decay"] == 0.125


def test_learned_scales_are_trained_and_not_fitted_anew() -> None:
    module = slim(LSQ)
    weight = Look(lambda _: module.fake and scale(module, "net/0/weight:weight"))
    value = Look(lambda _: module.fake and scale(module, "input0"))
    fit(module, max_epochs=2, callbacks=[weight, value])
    for seen in (weight.seen[3:], value.seen[3:]):
        assert len(set(seen)) == len(seen) == 5
        steps = [abs(b / a - 1) for a, b in itertools.pairwise(seen)]
        assert max(steps) < 0.25  # small steps, not another range


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 16),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 17),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.05, step_size_up=3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 16),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=12),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=6), lr_scheduler.CosineAnnealingLR(o, 10)],
        [6],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 6), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Scheduled(Lit):
    """Has one of torch's schedulers, stepped at every batch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.schedule = name

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        schedule = {"scheduler": SCHEDULES[self.schedule](optimizer), "interval": "step"}
        return [optimizer], [schedule]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings(
    "ignore:The epoch parameter in `scheduler.step", "ignore:To get the last"
)
def test_schedulers_go_on_and_move_both_groups_alike(name: str, tmp_path: Path) -> None:
    def rates(trainer: pl.Trainer) -> list[float]:
        return [group["lr"] for group in trainer.optimizers[0].param_groups]

    look, plain = Look(rates), Look(rates)
    fit(Scheduled(name), max_epochs=4, callbacks=[plain])
    module = slim({**LSQ, "learning_rate_scale": 0.5}, Scheduled(name))
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(module, max_epochs=4, callbacks=[look, keep])
    assert [rate for rate, *_ in look.seen] == [rate for rate, *_ in plain.seen]
    both = [pair for pair in look.seen if len(pair) == 2]
    assert len(both) == 9
    assert [ours for _, ours in both] == pytest.approx([0.5 * theirs for theirs, _ in both])
    resumed = Look(rates)
    again = slim({**LSQ, "learning_rate_scale": 0.5}, Scheduled(name))
    fit(again, max_epochs=4, callbacks=[resumed], ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed.seen == look.seen[12:]


def test_a_plateau_scheduler_goes_on() -> None:
    class Plateau(Lit):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
            }

    theirs, ours = fit(slim(LSQ, Plateau()), max_epochs=4).optimizers[0].param_groups
    assert ours["lr"] == theirs["lr"] < 0.05


def test_groups_of_named_parameters_stay_named() -> None:
    class Named(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.named_parameters(), 0.05)

    _, ours = fit(slim(LSQ, Named()), max_epochs=2).optimizers[0].param_groups
    assert "fake.quantizers.input0.ratio" in ours["param_names"]


def test_the_monitor_of_learning_rates_goes_on(tmp_path: Path) -> None:
    module = slim({**LSQ, "train_from": 0.5})
    monitor = LearningRateMonitor("step")
    fit(module, max_epochs=2, callbacks=[monitor], logger=CSVLogger(tmp_path, "", ""))
    assert monitor.lrs


def test_an_optimizer_without_groups_is_refused() -> None:
    class Whole(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(SlimkitError, match="LBFGS cannot train learned ranges.*minmax"):
        fit(slim(LSQ, Whole()), max_epochs=2)


def test_manual_optimization_trains_learned_ranges_too() -> None:
    from lit import Manual

    module = slim(LSQ, Manual())
    look = Look(lambda _: module.fake and scale(module, "input0"))
    fit(module, max_epochs=2, callbacks=[look])
    assert len(set(look.seen[3:])) == 5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["lsq", "pact"])
def test_a_resumed_run_with_learned_ranges_ends_bit_equal(
    tmp_path: Path, epoch: int, optimizer: str, name: str
) -> None:
    quantize = {
        "train_from": 0.35,  # observes over the end of the second epoch
        "calibration_batches": 3,
        "weights": name,
        "activations": name,
        "freeze_ranges_at": 0.7,
        "freeze_batchnorm_at": 0.7,
    }
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = slim(quantize, Lit(optimizer=optimizer))
    fit(whole, max_epochs=5, callbacks=[keep])
    resumed = slim(quantize, Lit(optimizer=optimizer))
    fit(resumed, max_epochs=5, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    expected = whole.state_dict()
    assert list(resumed.state_dict()) == list(expected)
    different = [k for k, v in resumed.state_dict().items() if not torch.equal(v, expected[k])]
    assert different == []


def test_a_resumed_run_keeps_its_weights_width_on_another_processor(
    tmp_path: Path, monkeypatch
) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    monkeypatch.setattr(OnnxRuntime, "weight_bits", lambda self: None)
    fit(slim(LSQ), max_epochs=3, callbacks=[keep])
    monkeypatch.setattr(OnnxRuntime, "weight_bits", lambda self: 7)
    resumed = slim(LSQ)
    fit(resumed, max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.fake.scheme.weights.bits == 8
    anew = slim(LSQ)
    fit(anew, max_epochs=2)
    assert anew.fake.scheme.weights.bits == 7


def test_a_second_fit_trains_the_ranges_on() -> None:
    module = slim(LSQ)
    fit(module, max_epochs=2)
    before = scale(module, "input0")
    trainer = fit(module, max_epochs=2)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert scale(module, "input0") != before


# --- following and freezing -------------------------------------------------------------------


def test_ranges_that_follow_the_data_go_on_until_they_are_frozen() -> None:
    data = Batches()
    growing = data.train[:][0] * torch.arange(1, 33).view(-1, 1, 1, 1)
    data.train = torch.utils.data.TensorDataset(growing, data.train[:][1])
    options = {"train_from": 0.25, "activations": "minmax", "observe": "always"}
    module = slim({**options, "freeze_ranges_at": 0.75})
    look = Look(lambda _: module.fake and scale(module, "input0"))
    fit(module, data, max_epochs=1, callbacks=[look])
    assert look.seen[2] > look.seen[1]
    assert look.seen[3] == look.seen[2]  # of 4 batches, the last is behind 0.75


def test_validation_does_not_move_ranges_that_follow_the_data() -> None:
    loud = Batches()
    loud.val = torch.utils.data.TensorDataset(1e6 * loud.val[:][0], loud.val[:][1])
    module = slim({"train_from": 0.0, "activations": "minmax", "observe": "always"})
    fit(module, loud, max_epochs=3)
    assert scale(module, "input0") < 1


def test_learned_ranges_stay_once_frozen_and_weights_learn_on() -> None:
    module = slim({**LSQ, "freeze_ranges_at": 0.5})
    names = ("input0", "net/0/weight:weight")
    look = Look(lambda _: module.fake and [scale(module, name) for name in names])
    fit(module, max_epochs=2, callbacks=[look])
    activation, weight = zip(*look.seen[3:], strict=True)
    assert len(set(activation[1:])) == 1
    assert len(set(weight)) == 5


def test_batch_norm_keeps_its_statistics_once_frozen() -> None:
    module = slim({"train_from": 0.25, "freeze_batchnorm_at": 0.5})
    norm = module.network.net[1]
    look = Look(lambda _: (norm.running_mean.clone(), norm.weight.detach().clone()))
    fit(module, max_epochs=2, callbacks=[look])
    means, weights = zip(*look.seen, strict=True)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(means)]
    assert moved == [True] * 3 + [False] * 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))


def test_frozen_batch_norm_computes_with_its_statistics() -> None:
    module = slim({"train_from": 0.25, "freeze_batchnorm_at": 0.5})
    norm = module.network.net[1]
    flags = Look(lambda _: norm.training)
    fit(module, max_epochs=2, callbacks=[flags])
    assert flags.seen == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({**LSQ, "observe": "always"}, "quantize.observe: lsq learns its ranges by gradient"),
        ({"train_from": 0.5, "freeze_ranges_at": 0.6}, "ranges of percentile stay as they are any"),
    ],
)
def test_options_that_would_do_nothing_are_said_before_training(quantize, message: str) -> None:
    with pytest.raises(SlimkitError, match=message):
        fit(slim(quantize))


@pytest.mark.parametrize(
    ("quantize", "path", "message"),
    [
        ({"freeze_ranges_at": 0.5}, "freeze_ranges_at", "needs 'train_from'"),
        (
            {"train_from": 0.5, "freeze_batchnorm_at": 0.4},
            "freeze_batchnorm_at",
            "should not be before train_from (0.5), not 0.4",
        ),
        ({"observe": "always"}, "observe", "'always' needs 'train_from'"),
        ({"observe": "often", "train_from": 0.1}, "observe", "should be 'once' or 'always'"),
        ({"weight_bits": 1}, "weight_bits", "should be greater than or equal to 2"),
        ({"learning_rate_scale": 0}, "learning_rate_scale", "should be greater than 0"),
    ],
)
def test_a_recipe_says_what_does_not_fit(quantize, path: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"quantize": quantize})
    (problem,) = caught.value.problems
    assert problem.path == f"quantize.{path}"
    assert message in problem.message


# --- narrower weights -------------------------------------------------------------------------


def test_weights_wider_than_the_backends_are_refused_before_training() -> None:
    with pytest.raises(QuantizationError, match="9 bits do not fit the 8 bits.*from 2 to 8"):
        fit(slim({"weight_bits": 9}))


def test_a_backend_holds_its_own_arithmetic_and_narrower_weights() -> None:
    backend: Scheme = discover().create("backend", "ncnn").scheme
    other: Scheme = discover().create("backend", "onnxruntime").scheme
    assert backend.holds(backend)
    assert backend.holds(backend.narrowed(4))
    assert not backend.narrowed(4).holds(backend)
    assert not backend.holds(other)


# --- export -----------------------------------------------------------------------------------


class Wide(Lit):
    """Large enough that its int8 file is smaller than its float one."""

    def __init__(self) -> None:
        super().__init__(wide=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[SlimModule, Path]:
    """After QAT with learned ranges of 4-bit weights, exported for both runtimes."""
    torch.manual_seed(0)
    quantize = {**LSQ, "weight_bits": 4, "learning_rate_scale": 2.0}
    module = slim(quantize, Wide(), export=["onnxruntime", "ncnn"])
    data = Batches()
    fit(module, data, max_epochs=3)
    folder = tmp_path_factory.mktemp("trained") / "small"
    module.export(folder, data)
    return module, folder


@pytest.mark.parametrize("backend", ["onnxruntime", "ncnn"])
def test_files_agree_with_the_simulation_after_learning(trained, backend: str) -> None:
    _, folder = trained
    simulated = slimkit.load(folder, Wide, backend=backend)
    run = discover().create("backend", backend).load(folder / "exports" / backend)
    x = normal(16, 3, 8, 8)
    deployed = torch.cat([run(x[i : i + 1])[0] for i in range(16)])
    with torch.no_grad():
        expected = simulated(x)
    error = (deployed - expected).abs().max() / expected.abs().max()
    assert error < 0.02


def test_the_artifact_holds_the_learned_ranges(trained) -> None:
    module, folder = trained
    x = normal(16, 3, 8, 8)
    loaded = slimkit.load(folder, Wide)
    simulation = QuantizedModel(module.network, module.fake, "").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), simulation(x))


def test_the_other_backend_takes_what_was_learned_for_the_weights(trained) -> None:
    module, folder = trained
    loaded = slimkit.load(folder, Wide, backend="ncnn")
    names = [name for name, _ in loaded.fake.sites.weights.values()]
    assert names
    for name in names:
        assert torch.equal(loaded.fake[name].qparams()[0], module.fake[name].qparams()[0])


def test_files_hold_no_more_than_sixteen_values_of_a_weight(trained) -> None:
    import onnx
    from onnx import numpy_helper

    _, folder = trained
    model = onnx.load(folder / "exports/onnxruntime/model.onnx")
    kernels = [
        array
        for array in map(numpy_helper.to_array, model.graph.initializer)
        if array.dtype == "int8" and array.ndim == 4
    ]
    assert len(kernels) == 2
    for kernel in kernels:
        assert -7 <= kernel.min() < kernel.max() <= 7


def test_a_quantized_model_with_narrower_weights_is_exported_in_one_line(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.ReLU()), normal(8, 3, 8, 8)
    small = slimkit.quantize(net, [x], weights="lsq", weight_bits=4)
    artifact = slimkit.export(small, x, directory=tmp_path / "out")
    assert artifact.agreement > 0.99


def test_scheme_of_narrows_what_the_backend_says() -> None:
    recipe = Recipe.parse({"quantize": {"weight_bits": 3}}).quantize
    assert scheme_of(PluginRef(name="ncnn"), recipe).weights.bits == 3


def test_averaged_weights_have_averaged_ranges() -> None:
    module = slim({"train_from": 0.5, "weights": "lsq", "activations": "lsq"})
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []

    def note(found: list[torch.Tensor]) -> None:
        if module.fake is not None and module.fake.state == "quantize":
            found.append(next(module.fake["input0"].parameters()).detach().clone())

    class Look(pl.Callback):
        def on_before_optimizer_step(self, *_: object) -> None:
            note(before)

        def on_train_batch_end(self, *_: object) -> None:
            note(after)

    fit(module, max_epochs=4, callbacks=[Look(), EMAWeightAveraging(decay=0.5)])
    (copy,) = copies_of(module, module.trainer)
    expected = before[0]
    for step in after:
        expected = 0.5 * expected + 0.5 * step
    assert len(after) > 3
    assert not torch.equal(expected, after[-1])
    torch.testing.assert_close(next(copy.fake["input0"].parameters()), expected)
