"""Teachers: who they are, what they compute, how several share, and those that change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit import Batches, Lit, fit, network
from nets import normal
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import slimkit
from slimkit import SlimModule
from slimkit.errors import SlimkitError
from slimkit.training.confidence import confidence, mixed

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
KL = {"name": "kl", "options": {"temperature": 2.0}}


def other(seed: int = 5, classes: int = 4) -> nn.Module:
    """A network of another architecture, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, classes))


def raising() -> nn.Module:
    raise ValueError("no such file")


def untrainable() -> nn.Module:
    return other()


class OtherLit(Lit):
    """A LightningModule with another network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = other()


def made(prune: bool = False, **distill: Any) -> SlimModule:
    section = {"losses": [KL], **distill}
    return SlimModule(
        Lit(), {"distill": section, **({"prune": PRUNE} if prune else {"quantize": {}})}
    )


def one_step(slim: SlimModule, batch: Any) -> Tensor:
    slim.log = slim.inner.log = lambda *args, **kwargs: None
    slim.train()
    return slim.training_step(batch, 0)


def batch() -> tuple[Tensor, Tensor]:
    return Batches().train[:8]


def kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    s, t = (x.double() / temperature for x in (student, teacher))
    p = t.softmax(1)
    return (p * (p.log() - s.softmax(1).log())).sum(1).mean() * temperature**2


# --- who teaches ------------------------------------------------------------------------------


def test_a_teacher_by_import_path_is_built_with_its_options() -> None:
    teacher = {"name": "test_teachers:other", "options": {"seed": 7}}
    slim = made(teacher=teacher, label_weight=0)
    x, y = batch()
    expected = kl(Lit().train()(x), other(7)(x)).item()
    assert one_step(slim, (x, y)).item() == pytest.approx(expected, rel=1e-4)


def test_building_a_teacher_draws_no_random_number() -> None:
    torch.manual_seed(0)
    made(teacher="lit:Lit")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_a_teacher_has_weights_of_a_file(tmp_path: Path) -> None:
    save_file(other(9).state_dict(), tmp_path / "nine.safetensors")
    named = {"name": "test_teachers:other", "weights": str(tmp_path / "nine.safetensors")}
    x, y = batch()
    expected = kl(Lit().train()(x), other(9)(x)).item()
    slim = made(teacher=named, label_weight=0)
    assert one_step(slim, (x, y)).item() == pytest.approx(expected, rel=1e-4)


def test_a_weights_file_is_of_the_model_itself(tmp_path: Path) -> None:
    better = Lit()
    with torch.no_grad():
        better.net[8].weight.mul_(3)
    torch.save(better.state_dict(), tmp_path / "better.pt")
    x, y = batch()
    expected = kl(Lit().train()(x), better.eval()(x)).item()
    slim = made(teacher=str(tmp_path / "better.pt"), label_weight=0)
    assert one_step(slim, (x, y)).item() == pytest.approx(expected, rel=1e-4)


def test_an_artifact_teaches(tmp_path: Path) -> None:
    small = slimkit.prune(
        network(2), normal(1, 3, 8, 8), target={"ratio": 0.25}, round_to=1, criterion="random"
    )
    folder = slimkit.save(small, tmp_path / "small", built_by="test_teachers:wide")
    x, y = batch()
    expected = kl(Lit().train()(x), small.eval()(x)).item()
    slim = made(teacher=str(folder), label_weight=0)
    assert one_step(slim, (x, y)).item() == pytest.approx(expected, rel=1e-4)


def wide() -> nn.Module:
    return network(2)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("test_teachers:othr", "distill.teacher: test_teachers has no 'othr'; did you mean 'oth"),
        ("no_such_module:net", "distill.teacher: no_such_module cannot be imported"),
        ("test_teachers:raising", "failed: ValueError: no such file"),
        ("./nothing", "there is no file or folder nothing in"),
        ({"name": "test_teachers:other", "weights": "gone.pt"}, "no weights file gone.pt in"),
        ({"name": "dense", "weights": "tests/training/lit.py"}, "cannot be loaded into the model"),
        (
            {"name": "test_teachers:untrainable", "learns": True},
            "returns a Sequential, which has no loss to learn by: return a LightningModule",
        ),
    ],
)
def test_a_teacher_that_cannot_be_had_is_said(teacher: Any, message: str) -> None:
    with pytest.raises(SlimkitError, match=message):
        made(teacher=teacher)


def test_a_teacher_without_the_place_is_named_with_the_nearest() -> None:
    losses = [{"name": "attention", "at": ["net.2", "layer2"]}]
    message = "loss 'attention': the teacher test_teachers:other has no module 'layer2'"
    with pytest.raises(SlimkitError, match=message):
        made(teacher="test_teachers:other", losses=losses)


def test_a_teacher_of_other_classes_is_refused_before_a_weight_changes() -> None:
    slim = made(teacher={"name": "test_teachers:other", "options": {"classes": 6}})
    before = copy.deepcopy(slim.network.state_dict())
    with pytest.raises(
        SlimkitError,
        match="teacher test_teachers:other at output: the student has 4 cla.* and the teacher 6",
    ):
        fit(slim)
    assert all(torch.equal(p, before[n]) for n, p in slim.network.named_parameters())


# --- how it computes --------------------------------------------------------------------------


class Watched(nn.Module):
    """Writes down how it is called."""

    calls: list[tuple[bool, bool, torch.dtype]] = []

    def __init__(self) -> None:
        super().__init__()
        self.net = other()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(self.norm(x))
        self.calls.append((self.training, torch.is_grad_enabled(), out.dtype))
        return out


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("bf16", torch.bfloat16)])
def test_a_teacher_computes_in_eval_mode_without_gradients(precision, dtype) -> None:
    Watched.calls.clear()
    slim = made(teacher="test_teachers:Watched", precision=precision)
    fit(slim)
    assert Watched.calls == [(False, False, dtype)] * 4
    (teacher,) = slim.distillation[0].teachers
    assert torch.equal(teacher.network.norm.running_mean, torch.zeros(3))
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_no_teacher_is_in_the_state_dict_or_the_optimizer() -> None:
    slim = made(teacher=["dense", "test_teachers:other"])
    trainer = fit(slim)
    assert list(slim.state_dict()) == [f"inner.{k}" for k in Lit().state_dict()]
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in slim.network.parameters()}


# --- several ----------------------------------------------------------------------------------


def test_several_teachers_share_by_their_weights() -> None:
    teachers = [
        {"name": "test_teachers:other", "weight": 3},
        {"name": "test_teachers:other", "options": {"seed": 8}, "weight": 1},
    ]
    slim = made(teacher=teachers, label_weight=0)
    x, y = batch()
    student = Lit().train()(x)
    expected = 0.75 * kl(student, other()(x)) + 0.25 * kl(student, other(8)(x))
    assert one_step(slim, (x, y)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_each_teacher_has_a_projection_of_its_own() -> None:
    losses = [{"name": "hint", "at": ["net.7", "output"]}]
    slim = made(
        teacher=["dense", {"name": "test_teachers:other", "options": {"classes": 7}}], losses=losses
    )
    fit(slim)
    projections = [loss.projection for loss in slim.distillation[0].comparisons[0].losses]
    assert [p.weight.shape for p in projections] == [(4, 12), (7, 12)]


def test_confidence_counts_whom_the_label_proves_right() -> None:
    """By hand: cross-entropies of two teachers, softmax over them, one minus that."""
    logits = [torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])]
    labels = torch.tensor([0, 1])
    errors = torch.tensor(
        [[-float(x.log_softmax(1)[n, labels[n]]) for n in range(2)] for x in logits]
    )
    weights = 1 - errors.exp() / errors.exp().sum(0)
    given = [{"output": x} for x in logits]
    found = confidence(given, "output", labels, [1.0, 1.0])
    torch.testing.assert_close(found, weights / weights.sum(0))
    assert (found[0] > found[1]).all()  # the first is right in both
    average = mixed(given, found)["output"]
    expected = sum(w[:, None] * x for w, x in zip(found, logits, strict=True))
    torch.testing.assert_close(average, expected)


def test_confidence_weighs_the_teachers_sample_by_sample() -> None:
    x, y = batch()
    teachers = ["test_teachers:other", {"name": "test_teachers:other", "options": {"seed": 8}}]
    slim = made(teacher=teachers, weighting="confidence", label_weight=0)
    outs = [other()(x), other(8)(x)]
    errors = torch.stack([functional.cross_entropy(o, y, reduction="none") for o in outs])
    weights = 1 - errors.softmax(0)
    target = (weights[..., None] * torch.stack(outs)).sum(0)
    expected = kl(Lit().train()(x), target).item()
    assert one_step(slim, (x, y)).item() == pytest.approx(expected, rel=1e-4)


def test_confidence_needs_the_same_shapes() -> None:
    teachers = ["dense", {"name": "test_teachers:other", "options": {"classes": 6}}]
    slim = made(teacher=teachers, weighting="confidence")
    with pytest.raises(SlimkitError, match=r"'output' they give \(8, 4\), \(8, 6\)"):
        one_step(slim, batch())


# --- an average of the student ----------------------------------------------------------------

EMA = {"name": "ema", "decay": 0.6}


def test_an_average_follows_the_students_weights_step_by_step() -> None:
    slim = made(teacher=EMA)
    expected = {k: v.clone() for k, v in slim.network.state_dict().items()}
    steps = 0

    class Follow(pl.Callback):
        def on_train_batch_end(self, trainer, *args):  # before slimkit's own
            nonlocal steps
            keep = min(0.6, (1 + steps) / (10 + steps))
            steps += 1
            for name, value in slim.network.state_dict().items():
                if value.is_floating_point():
                    expected[name] = keep * expected[name] + (1 - keep) * value
                else:
                    expected[name] = value.clone()

    fit(slim, max_epochs=2, callbacks=[Follow()])
    (average,) = slim.distillation[0].averages
    assert steps == 8
    for name, value in average.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_an_average_takes_no_step_while_gradients_gather() -> None:
    slim = made(teacher=EMA)
    fit(slim, accumulate_grad_batches=2, max_epochs=2)
    assert slim.distillation[0].averages[0].steps == 4


def test_an_average_is_cut_with_the_student() -> None:
    slim = made(prune=True, teacher=EMA)
    fit(slim, max_epochs=3)
    (average,) = slim.distillation[0].averages
    shapes = {k: v.shape for k, v in slim.network.state_dict().items()}
    assert slim.network.net[3].out_channels < 12
    assert {k: v.shape for k, v in average.network.state_dict().items()} == shapes
    x = normal(4, 3, 8, 8)
    apart = (average.network(x) - slim.network.eval()(x)).abs().max()
    assert apart < 0.5 * slim.network(x).abs().max()


# --- a peer -----------------------------------------------------------------------------------


def test_mutual_learning_is_the_papers_two_losses() -> None:
    """Deep mutual learning with two networks, a loop written by hand."""
    slim = made(teacher={"name": "test_teachers:OtherLit", "learns": True}, label_weight=0.5)
    fit(slim, max_epochs=2)
    one, two = Lit(), OtherLit()
    optimizer = torch.optim.SGD(
        [*one.parameters(), *two.parameters()], 0.05, momentum=0.9, weight_decay=1e-2
    )
    for _ in range(2):
        for start in range(0, 32, 8):
            x, y = (t[start : start + 8] for t in Batches().train[:])
            first, second = one.train()(x), two.train()(x)
            mine = 0.5 * functional.cross_entropy(first, y) + kl(first, second.detach())
            theirs = 0.5 * functional.cross_entropy(second, y) + kl(second, first.detach())
            optimizer.zero_grad()
            mine.backward()
            theirs.backward()
            optimizer.step()
        for group in optimizer.param_groups:  # StepLR of 2 epochs: as it was
            assert group["lr"] == 0.05
    (peer,) = slim.distillation[0].peers
    for trained, expected in ((slim.network, one), (peer.module, two)):
        for name, value in expected.named_parameters():
            torch.testing.assert_close(
                trained.get_parameter(name), value, rtol=1e-3, atol=1e-4, msg=name
            )


def test_mutual_is_a_copy_of_the_dense_model_that_is_trained_and_never_cut() -> None:
    slim = made(prune=True, teacher="mutual")
    trainer = fit(slim, max_epochs=2)
    (peer,) = slim.distillation[0].peers
    assert slim.network.net[3].out_channels < 12
    assert peer.network.net[3].out_channels == 12
    assert not torch.equal(peer.network.net[0].weight, Lit().net[0].weight)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in peer.network.parameters()} <= held
    assert {"distill/mutual/labels", "distill/mutual/kl@output"} <= set(trainer.logged_metrics)
    assert peer.module._trainer is None


def test_a_peer_of_a_plain_classifier_is_trained() -> None:
    section = {"losses": [KL], "teacher": {"name": "test_teachers:untrainable", "learns": True}}
    slim = SlimModule(network(), {"task": "classification", "quantize": {}, "distill": section})
    fit(slim)
    (peer,) = slim.distillation[0].peers
    assert not torch.equal(peer.network[0].weight, other()[0].weight)


def test_peers_learn_from_no_loss_that_learns() -> None:
    slim = made(teacher="mutual", losses=[{"name": "hint", "at": "net.5"}])
    with pytest.raises(SlimkitError, match="loss 'hint' learns projection.weight, which works one"):
        fit(slim)


@pytest.mark.parametrize("teacher", [EMA, "mutual", ["dense", EMA, "mutual"]], ids=str)
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_ends_bit_equal(tmp_path: Path, epoch: int, teacher: Any) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = made(prune=True, teacher=teacher), made(prune=True, teacher=teacher)
    fit(whole, max_epochs=4, callbacks=[keep])
    fit(resumed, max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")

    def everything(slim: SlimModule) -> dict[str, Tensor]:
        (distillation,) = slim.distillation
        found = dict(slim.state_dict())
        for n, teacher in enumerate(distillation.teachers):
            found |= {f"{n}.{k}": v for k, v in teacher.network.state_dict().items()}
        return found

    expected, found = everything(whole), everything(resumed)
    assert list(found) == list(expected)
    assert [k for k, v in found.items() if not torch.equal(v, expected[k])] == []


def test_lightnings_own_average_goes_with_teachers_that_change() -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging

    slim = made(prune=True, teacher=[EMA, "mutual"])
    fit(slim, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert slim.network.net[3].out_channels < 12


@pytest.mark.parametrize("name", ["hint", "crd", "feature-mse"])
def test_losses_of_an_average_are_cut_on_both_sides(name: str) -> None:
    losses = [{"name": name, "at": "net.5"}]
    slim = made(prune=True, teacher=["ema"], losses=losses)
    trainer = fit(slim, max_epochs=2)
    assert slim.network.net[3].out_channels < 12
    assert torch.isfinite(trainer.logged_metrics[f"distill/{name}@net.5"])
    (learnt,) = slim.distillation[0].comparisons[0].losses
    for parameter, dim in {**learnt.student_channels, **learnt.teacher_channels}.items():
        shape = learnt.get_parameter(parameter).shape
        assert shape[dim] == slim.network.net[3].out_channels


def test_features_of_an_average_and_a_fixed_teacher_cannot_be_mixed_once_cut() -> None:
    losses = [{"name": "kl"}, {"name": "attention", "at": "net.5"}]
    slim = made(prune=True, teacher=["dense", "ema"], losses=losses, weighting="confidence")
    with pytest.raises(SlimkitError, match="at 'net.5' pruning changes the channels of ema only"):
        fit(slim)


def test_a_checkpoint_holds_of_the_teachers_only_what_changes(tmp_path: Path) -> None:
    trainer = fit(made(teacher=["dense", "test_teachers:other", "ema"]))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=False)
    (state,) = saved["slimkit"]["distillation"]
    ((weights, steps),) = state["averages"]
    assert steps == 4
    assert list(weights) == list(Lit().state_dict())
    assert state["peers"] == []
    held = {id(t): t.numel() for t in torch.utils._pytree.tree_leaves(saved) if torch.is_tensor(t)}
    student = sum(t.numel() for t in Lit().state_dict().values())
    momenta = sum(p.numel() for p in Lit().parameters())
    assert sum(held.values()) == 2 * student + momenta
