"""Single weights are zeroed in a Lightning fit and stay exactly zero to the exported file."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lit import Batches, Lit, fit
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

import slimkit
from slimkit import SlimModule
from slimkit.errors import SlimkitError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # the data is tiny
    "ignore:.*callbacks used to create the checkpoint",  # a resumed run need not keep more of them
)

KINDS = {
    "element": {"granularity": "element", "target": {"ratio": 0.75}},
    "block": {"granularity": "block", "target": {"ratio": 0.5}, "block_size": [2, 2]},
    "2:4": {"granularity": "2:4"},
}
LAYERS = ("net.3.weight", "net.8.weight")  # the first convolution is protected
WEIGHTS = 12 * 8 * 9 + 4 * 12


def recipe(kind: str, **prune) -> dict:
    section = {**KINDS[kind], "during": [0.0, 0.5], "steps": 2, **prune}
    return {"prune": section, "distill": False}


def zeros(network) -> dict[str, int]:
    parameters = {n: p for n, p in network.named_parameters() if p.dim() > 1}
    return {n: int((p == 0).sum()) for n, p in parameters.items()}


def share(network) -> float:
    return sum(zeros(network)[name] for name in LAYERS) / WEIGHTS


class Zeros(pl.Callback):
    """The share of zero weights in front of each batch."""

    def __init__(self, slim: SlimModule) -> None:
        self.slim, self.shares = slim, []

    def on_train_batch_start(self, *args) -> None:
        self.shares.append(share(self.slim.network))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])  # both with momentum and weight decay
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_stays_zero_to_the_end(kind: str, optimizer: str) -> None:
    slim = SlimModule(Lit(optimizer=optimizer), recipe(kind, schedule="linear"))
    look = Zeros(slim)
    fit(slim, max_epochs=2, callbacks=[look])
    goal = KINDS[kind].get("target", {"ratio": 0.5})["ratio"]
    expected = [0, 0, goal / 2, goal / 2, goal, goal, goal, goal]
    assert look.shares == pytest.approx(expected, abs=0.005)
    assert share(slim.network) == pytest.approx(goal, abs=0.005)
    assert zeros(slim.network)["net.0.weight"] == 0


def test_two_of_each_four_inputs_are_zero_after_training() -> None:
    slim = SlimModule(Lit(), recipe("2:4"))
    fit(slim, max_epochs=2)
    net = slim.network.net
    assert ((net[3].weight.reshape(12, 2, 4, 9) == 0).sum(2) == 2).all()
    assert ((net[8].weight.reshape(4, 3, 4) == 0).sum(2) == 2).all()


def test_nothing_but_zeros_is_left_of_the_masks() -> None:
    slim = SlimModule(Lit(), recipe("element"))
    fit(slim, max_epochs=2)
    assert list(slim.network.state_dict()) == list(Lit().state_dict())
    assert not any(module._forward_pre_hooks for module in slim.network.modules())
    assert slim.network.slimkit_pruning.weights["net.8.weight"][0] == 48


@pytest.mark.parametrize("end", [0.5, 1.0])
def test_an_average_has_the_same_zeros(end: float) -> None:
    slim = SlimModule(Lit(), recipe("2:4", during=[0.0, end]))
    trainer = fit(slim, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert share(slim.network) == 0.5
    (callback,) = [c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
    assert share(callback._average_model.module.network) == 0.5


@pytest.mark.parametrize("criterion", ["l1", "taylor", "wanda"])
@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_bit_equal(
    tmp_path: Path, kind: str, epoch: int, criterion: str
) -> None:
    what = {
        **recipe(kind, criterion=criterion, steps=5, during=[0.1, 0.5], batchnorm_batches=3),
        "quantize": {"train_from": 0.7, "activations": "minmax"},
    }
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = SlimModule(Lit(), what), SlimModule(Lit(), what)
    fit(whole, max_epochs=5, callbacks=[keep])
    fit(resumed, max_epochs=5, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    expected = whole.state_dict()
    assert list(resumed.state_dict()) == list(expected)
    assert all(torch.equal(v, expected[k]) for k, v in resumed.state_dict().items())
    assert share(resumed.network) > 0.45


def test_zeros_reach_the_deployed_model(tmp_path: Path) -> None:
    what = {
        **recipe("2:4"),
        "quantize": {"train_from": 0.5, "activations": "minmax"},
        "export": ["torch"],
    }
    slim = SlimModule(Lit(wide=12), what)
    fit(slim, max_epochs=2)
    release = slim.export(tmp_path / "small", Batches())
    assert [row.label for row in release.rows][1] == "pruned"
    loaded = slimkit.load(tmp_path / "small", lambda: Lit(wide=12))
    weights = [p for n, p in loaded.named_parameters() if n.endswith(LAYERS)]
    assert len(weights) == 2
    assert all((w == 0).float().mean() == 0.5 for w in weights)


def test_what_cannot_be_is_said_before_the_first_step() -> None:
    slim = SlimModule(Lit(), recipe("element", max_ratio=0.5))
    before = {k: v.clone() for k, v in slim.state_dict().items()}
    with pytest.raises(SlimkitError, match="a ratio of 0.75 cannot be reached: max_ratio"):
        fit(slim)
    assert all(torch.equal(v, before[k]) for k, v in slim.state_dict().items())


def test_fours_that_do_not_fit_are_said_before_the_first_step() -> None:
    slim = SlimModule(Lit(), recipe("2:4", protect_first=False))
    with pytest.raises(SlimkitError, match=r"2:4 needs .* net.0 \(3\).* protect: \[net.0\]"):
        fit(slim)


def test_zeros_are_said_and_logged(tmp_path: Path) -> None:
    slim = SlimModule(Lit(), recipe("2:4", schedule="linear"))
    said = []
    slim.announce = said.append
    fit(slim, max_epochs=2, logger=CSVLogger(tmp_path, "", ""))
    assert [line.partition(": ")[2] for line in said if "are zero" in line] == [
        "25.0% of 912 weights are zero, step 1 of 2",
        "50.0% of 912 weights are zero, step 2 of 2",
    ]
    assert "slimkit/sparsity/net.3.weight" in (tmp_path / "metrics.csv").read_text()
