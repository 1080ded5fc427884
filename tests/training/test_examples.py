"""Modules that public examples write are compressed as they are, or refused before training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from examples import (
    GAN,
    Accumulating,
    Autoencoder,
    Backward,
    Classifier,
    Compiled,
    Contrastive,
    Detector,
    Momentum,
    Segmenter,
    Tagger,
    Transfer,
    images,
    masks,
    pairs,
    targets,
    views,
    words,
)
from lit import fit
from torch import Tensor, nn

import slimkit
from slimkit import SlimModule
from slimkit.errors import SlimkitError
from slimkit.training.entering import Entry, positional
from slimkit.training.evaluation import muted

PRUNE = {"criterion": "l1", "target": {"flops": 0.6}, "during": [0.0, 0.5], "steps": 2}
TAYLOR = {**PRUNE, "criterion": "taylor"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*not been set for this class"),
    pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no"),
]

WHOLE = {
    "classifier": (Classifier, pairs, None),
    "segmenter": (Segmenter, masks, None),
    "detector": (Detector, targets, "model.body"),
    "gan": (GAN, pairs, None),
    "generator": (GAN, pairs, "generator"),
    "accumulating": (Accumulating, pairs, None),
    "contrastive": (Contrastive, views, "encoder"),
    "momentum": (Momentum, views, None),
    "online": (Momentum, views, "online"),
    "tagger": (Tagger, words, None),
    "autoencoder": (Autoencoder, pairs, "decoder"),
    "compiled": (Compiled, pairs, None),
}


def slim(kind: str, **recipe: Any) -> tuple[SlimModule, Any]:
    """The example as a SlimModule, and its data."""
    make, data, network = WHOLE[kind]
    torch.manual_seed(0)
    return SlimModule(make(), {"network": network, **recipe}), data()


def convolved(network: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiply-accumulates of convolutions and linear layers, counted from their own shapes."""
    total = 0

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal total
        weight, x = module.weight, args[0]
        transposed = isinstance(module, nn.ConvTranspose2d)
        places = x[0, 0].numel() if transposed else out[0, 0].numel()
        if isinstance(module, nn.Linear):
            places = x.numel() // x.shape[-1] // len(x)
        total += places * weight.numel()

    kinds = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        network.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("kind", WHOLE)
def test_it_is_pruned_distilled_and_rounded(kind: str) -> None:
    at = "output.logits" if kind == "tagger" else "output"
    distill = {"losses": [{"name": "kl", "at": at}]}
    module, data = slim(kind, prune=PRUNE, distill=distill, quantize={"train_from": 0.75})
    before = copy.deepcopy(module.dense)
    trainer = fit(module, data, max_epochs=4)
    assert module.state.cut
    assert module.state.distilled
    assert any(name.startswith("distill/") for name in trainer.callback_metrics)
    assert module.fake is not None
    assert module.fake.state == "quantize"
    inputs = module.state.example_inputs
    left = convolved(module.network, inputs) / convolved(before, inputs)
    assert 0.3 < left <= 0.62
    assert left == pytest.approx(module.state.macs_left, abs=0.02)


@pytest.mark.parametrize("kind", ["classifier", "accumulating", "gan", "tagger", "online"])
def test_criteria_of_gradients_work_whoever_steps_the_optimizer(kind: str) -> None:
    module, data = slim(kind, prune=TAYLOR, distill=False)
    fit(module, data, max_epochs=4)
    assert module.state.cut


def test_gradients_are_scored_before_a_step_by_hand_throws_them_away() -> None:
    seen: list[Tensor] = []

    class Watching(Accumulating):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(self.model[1].weight.grad.clone())

    module = SlimModule(Watching(), {"prune": {**TAYLOR, "during": [0.0, 1.0]}, "distill": False})
    scored: list[Tensor] = []
    callback = next(c for c in module.configure_callbacks() if type(c).__name__ == "ChannelPruning")
    own = callback._collect_scores

    def collect() -> None:
        scored.append(module.inner.model[1].weight.grad.clone())
        own()

    callback._collect_scores = collect
    module.configure_callbacks = lambda: [callback]  # type: ignore[method-assign]
    fit(module, pairs(), max_epochs=2)
    assert len(scored) == len(seen) == 2  # of four batches, every second steps
    assert all(torch.equal(a, b) for a, b in zip(scored, seen, strict=True))


INPUTS = {
    "classifier": lambda b: (b[0],),
    "segmenter": lambda b: (b["image"],),
    "detector": lambda b: (torch.stack(b[0]),),
    "contrastive": lambda b: (b[0][0],),
    "online": lambda b: (b[0][0],),
    "tagger": lambda b: (b["input_ids"],),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_are_those_that_the_modules_own_step_passes(kind: str) -> None:
    module, data = slim(kind)
    batch = next(iter(data.train_dataloader()))
    (found,), (expected,) = module.entry(batch), INPUTS[kind](batch)
    assert torch.equal(found, expected)


def test_looking_for_inputs_leaves_no_trace() -> None:
    module, data = slim("gan")
    fit(module, data, max_epochs=1)
    module.train()
    module.inner.discriminator.eval()
    flags = [p.requires_grad for p in module.parameters()]
    training = [m.training for m in module.modules()]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    batch = next(iter(data.train_dataloader()))
    torch.manual_seed(7)
    (z,) = module.entry(batch)
    assert z.shape == (8, 8)
    assert torch.equal(torch.rand(3), expected)
    assert [p.requires_grad for p in module.parameters()] == flags
    assert [m.training for m in module.modules()] == training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert "forward" not in vars(module.network)


class Wants(nn.Module):
    def forward(self, x: Any, mask: Any = None, scale: float = 2.0, labels: Any = None) -> Any:
        return x * scale if mask is None else x * mask


class Named(nn.Module):
    def forward(self, x: Any, *, mask: Any) -> Any:
        return x * mask


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1,), {}, (1,)),
        ((1,), {"labels": 9}, (1,)),
        ((), {"x": 1, "mask": 3}, (1, 3)),
        ((1,), {"scale": 4.0}, (1, None, 4.0)),
        ((1, None), {}, (1,)),
        ((1, 2, 3, 9), {}, (1, 2, 3)),
    ],
)
def test_arguments_become_positional_and_labels_are_left_out(args, kwargs, expected) -> None:
    assert positional(Wants(), args, kwargs) == expected


def test_what_can_only_be_given_by_name_is_said() -> None:
    with pytest.raises(SlimkitError, match="called with mask by name"):
        positional(Named(), (1,), {"mask": 2})


def test_distillation_of_a_step_by_hand_is_the_loop_written_by_hand() -> None:
    recipe = {"distill": {"losses": [{"name": "kl", "weight": 0.7, "options": {"temperature": 2}}]}}
    torch.manual_seed(0)
    module, own = SlimModule(Accumulating(), recipe), None
    own = copy.deepcopy(module.inner)
    teacher = copy.deepcopy(own).eval()
    with torch.no_grad():
        for p, q in zip(own.parameters(), module.inner.parameters(), strict=True):
            noise = 0.1 * torch.randn(p.shape)
            p += noise
            q += noise
    fit(module, pairs(), max_epochs=1)
    x, y = images()
    optimizer = torch.optim.SGD(
        own.parameters(), lr=own.hparams.lr, momentum=0.9, weight_decay=5e-4
    )
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)
    for a, b in zip(x.split(8), y.split(8), strict=True):
        out = own(a)
        with torch.no_grad():
            wanted = teacher(a)
        p, q = F.log_softmax(out / 2, 1), F.log_softmax(wanted / 2, 1)
        kl = 4 * (q.exp() * (q - p)).sum(1).mean()
        (F.nll_loss(out, b) / 2 + 0.7 * kl).backward()
    nn.utils.clip_grad_norm_(own.parameters(), 0.5)
    optimizer.step()
    for (name, p), q in zip(own.named_parameters(), module.inner.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name


def test_only_the_step_of_the_student_learns_from_the_teacher() -> None:
    """The discriminator's loss stays its own."""
    backwards: list[float] = []

    class Watching(GAN):
        def on_before_backward(self, loss: Tensor) -> None:
            backwards.append(float(loss.detach()))

    module = SlimModule(
        Watching(), {"distill": {"losses": [{"name": "feature-mse", "weight": 5.0}]}}
    )
    with torch.no_grad():
        for p in module.inner.generator.parameters():
            p += 0.1
    trainer = fit(module, pairs(), max_epochs=1, limit_train_batches=1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    added = logged["distill/feature-mse@output"]
    assert added > 0
    assert backwards == pytest.approx([logged["g_loss"] + added, logged["d_loss"]], rel=1e-5)


def test_a_step_that_goes_round_manual_backward_is_refused() -> None:
    module = SlimModule(Backward(), {})
    before = copy.deepcopy(module.inner.state_dict())
    with pytest.raises(SlimkitError, match="calls no self.manual_backward"):
        fit(module, pairs())
    assert before.keys() == module.inner.state_dict().keys()
    fit(SlimModule(Backward(), {"distill": False, "prune": PRUNE}), pairs(), max_epochs=2)


def test_compiled_parts_train_as_plain_ones_to_the_last_bit() -> None:
    said: list[str] = []
    results = []
    for make in (Classifier, Compiled, lambda: torch.compile(Classifier(), backend="eager")):
        torch.manual_seed(0)
        module = SlimModule(make(), {"prune": PRUNE})
        module.announce = said.append
        fit(module, pairs(), max_epochs=2)
        results.append(module.network.state_dict())
    assert [line for line in said if "without torch.compile" in line] == [
        f"{what} trains without torch.compile, since slimkit changes structure and operations: "
        "compile what comes out"
        for what in ("model", "Classifier")
    ]
    assert results[0].keys() == results[1].keys() == results[2].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])
        assert torch.equal(value, results[2][name])


def test_an_artifact_of_a_compiled_module_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SlimModule(Compiled(), {"prune": PRUNE, "distill": False})
    with muted():
        fit(module, pairs(), max_epochs=2)
        module.export(tmp_path / "out", pairs())
    loaded = slimkit.load(tmp_path / "out", model=Compiled)
    x = images()[0]
    assert torch.allclose(loaded(x), module.network.eval()(x), atol=1e-6)


def test_the_module_that_was_compiled_stays_compiled() -> None:
    given = Compiled()
    SlimModule(given, {})
    assert type(given.model).__name__ == "OptimizedModule"


@pytest.mark.parametrize("kind", ["momentum", "online"])
def test_an_average_inside_the_module_loses_the_same_channels(kind: str) -> None:
    module, data = slim(kind, prune={**PRUNE, "during": [0.0, 0.25]}, distill=False)
    before: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if not module.state.cut:
                before.update({k: v.clone() for k, v in module.inner.target.state_dict().items()})

    fit(module, data, max_epochs=4, callbacks=[Look()])
    target, online = module.inner.target, module.inner.online
    shapes = {name: p.shape for name, p in online.named_parameters()}
    assert shapes == {name: p.shape for name, p in target.named_parameters()}
    assert shapes["1.0.weight"] != before["1.0.weight"].shape
    assert module.state.twins == [("target", "online" if kind == "momentum" else "")]


def test_kept_channels_of_an_average_are_those_of_the_network() -> None:
    module, data = slim("online", prune={**PRUNE, "during": [0.0, 0.25]}, distill=False)
    before: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if not module.state.cut:
                before[:] = [module.inner.target[1][0].weight.clone()]

    fit(module, data, max_epochs=2, callbacks=[Look()])
    by_hand = before[0]
    for dim, positions in module.network.slimkit_pruning.kept["1.0.weight"].items():
        by_hand = by_hand.index_select(dim, torch.tensor(positions))
    after = module.inner.target[1][0].weight
    assert torch.allclose(by_hand, after, atol=0.01)  # it has followed for three batches since
    assert not torch.allclose(by_hand.flip(0), after, atol=0.01)


def test_a_copy_that_stays_as_it_is_keeps_its_channels() -> None:
    class Taught(Momentum):
        def on_train_batch_end(self, *_: Any) -> None:
            """The target is a fixed teacher here."""

    module = SlimModule(Taught(), {"network": "online", "prune": PRUNE, "distill": False})
    fit(module, views(), max_epochs=2)
    assert module.inner.target[1][0].weight.shape == (24, 16, 3, 3)
    assert module.inner.online[1][0].weight.shape[0] < 24
    assert module.state.twins == []


@pytest.mark.parametrize("kind", ["momentum", "online"])
def test_a_run_with_an_average_goes_on_behind_the_cut(kind: str, tmp_path: Path) -> None:
    recipe = {"prune": {**PRUNE, "during": [0.0, 0.25]}, "distill": False}
    whole, data = slim(kind, **recipe)
    kept = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1, save_top_k=-1)
    fit(whole, data, max_epochs=4, callbacks=[kept])
    again, data = slim(kind, **recipe)
    middle = next(tmp_path.glob("epoch=1*"))
    fit(again, data, max_epochs=4, ckpt_path=middle)
    for (name, p), q in zip(whole.inner.named_parameters(), again.inner.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_an_artifact_of_a_part_is_loaded_by_the_function_of_the_whole(tmp_path: Path) -> None:
    module, data = slim("detector", prune=PRUNE, quantize={})
    with muted():
        fit(module, data, max_epochs=2)
        release = module.export(tmp_path / "out", data)
    assert release.metric is not None
    assert release.metric.name == "val_hits"
    assert all(row.metric is not None for row in release.rows)
    loaded = slimkit.load(tmp_path / "out", model=Detector)
    x = images()[0][:1]
    assert loaded(x).shape == module.network(x).shape
    inner = copy.deepcopy(module.inner).eval()
    dense = Detector().eval()
    dense.load_state_dict({**dense.state_dict(), **_without_body(inner)}, strict=True)
    float_rows = [row for row in release.rows if row.stage == "compressed"]
    hits = [
        inner.model([x])["logits"].mean((2, 3)).argmax(1) == t["labels"][0] for x, t in data.samples
    ]
    assert float_rows[0].metric == pytest.approx(sum(map(float, hits)) / len(hits))


def _without_body(inner: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in inner.state_dict().items() if not k.startswith("model.body")}


def test_an_unknown_part_is_said_with_the_nearest() -> None:
    with pytest.raises(SlimkitError, match="has no part 'encodr'; did you mean 'encoder'"):
        SlimModule(Contrastive(), {"network": "encodr"})


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (Detector, targets, "no step of Detector calls its own forward .* network: model"),
        (Contrastive, views, "network: encoder or network: projection"),
        (Autoencoder, pairs, "network: encoder or network: decoder"),
    ],
)
def test_a_network_that_no_step_calls_is_refused_before_a_weight_changes(
    make: Any, data: Any, message: str
) -> None:
    module = SlimModule(make(), {"prune": PRUNE, "distill": False})
    before = copy.deepcopy(module.inner.state_dict())
    with pytest.raises(SlimkitError, match=message):
        fit(module, data())
    assert all(torch.equal(v, before[k]) for k, v in module.inner.state_dict().items())


def test_a_forward_that_is_called_by_name_is_simulated_too() -> None:
    """Segmenter's steps call self.forward(x), where no hook runs."""
    module, data = slim("segmenter", quantize={"train_from": 0.0}, distill=False)
    fit(module, data, max_epochs=2)
    x = data.samples[0]["image"][None]
    module.eval()
    assert module.fake is not None
    with module.fake.active(module.network), torch.no_grad():
        called, by_name = module.network(x), module.network.forward(x)
    with torch.no_grad():
        plain = module.network(x)
    assert torch.equal(called, by_name)
    assert not torch.equal(called, plain)


def test_frozen_backbones_are_pruned_by_what_needs_no_gradient() -> None:
    module = SlimModule(Transfer(), {"prune": PRUNE, "distill": False})
    fit(module, pairs(), max_epochs=2)
    assert module.state.macs_left <= 0.6


def test_without_a_validation_step_files_are_compared_and_a_gate_is_refused(tmp_path: Path) -> None:
    said: list[str] = []
    module = SlimModule(Transfer(), {"prune": PRUNE, "distill": False})
    module.announce = said.append
    fit(module, pairs(), max_epochs=2)
    release = module.export(tmp_path / "out", pairs())
    assert said[-1].startswith("no metric: Transfer has no validation_step")
    assert [row.metric for row in release.rows] == [None, None]
    assert all(row.agreement.share == 1.0 for row in release.rows)
    gated = SlimModule(Transfer(), {"prune": PRUNE, "gates": {"accuracy_drop": 0.01}})
    with pytest.raises(SlimkitError, match="gates.accuracy_drop: Transfer has no validation_step"):
        fit(gated, pairs())


class Hooked(Classifier):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x * 3, y


def test_batches_of_a_calibration_go_through_the_modules_hooks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = {"prune": PRUNE, "quantize": {"activations": "minmax"}, "distill": False}
    module = SlimModule(Hooked(), {**recipe, "trainer": {"max_epochs": 2}})
    fit(module, pairs(), max_epochs=2)
    with muted():
        module.export(tmp_path / "out", pairs())
    loaded = slimkit.load(tmp_path / "out", model=Classifier)
    x = 3 * images()[0]
    first = next(n for n in loaded.fake.sites.activations if n.startswith("input") or ":in" in n)
    quantizer = loaded.fake[first]
    assert float(quantizer.scale) == pytest.approx(
        (max(0.0, float(x.max())) - min(0.0, float(x.min()))) / 255, rel=0.02
    )


def test_entries_are_taken_from_the_step_that_worked_before() -> None:
    calls: list[str] = []

    class Counting(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            calls.append("validation")
            raise ValueError("wants other batches")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append("training")
            return super().training_step(batch, batch_idx)

    entry = Entry(Counting())
    batch = images()
    assert torch.equal(entry(batch)[0], batch[0])
    assert torch.equal(entry(batch)[0], batch[0])
    assert calls == ["validation", "training", "training"]


def test_a_step_that_knows_other_batches_is_passed_over() -> None:
    """Two views in training and images in validation, as contrastive learning has them."""

    class Views(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (one, other), labels = batch
            return super().training_step((one + other, labels), batch_idx)

    images_, labels = images()
    entry = Entry(Views())
    assert torch.equal(entry(((images_, images_), labels))[0], 2 * images_)
    assert torch.equal(entry((images_, labels))[0], images_)
