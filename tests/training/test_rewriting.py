"""A recipe's rewrites come before training: the student has them, the teacher does not."""

import json

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import slimkit
from slimkit.builtin.backends.reference import Reference
from slimkit.errors import SlimkitError
from slimkit.recipe import Recipe
from slimkit.report.page import write_report
from slimkit.training.run import run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = functional.silu(self.conv(functional.pixel_unshuffle(x, 2)))
        return self.head(functional.silu(self.body(x)).mean((2, 3)))


def net():
    torch.manual_seed(11)
    return Net()


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        labels = torch.arange(64) % 4
        images = torch.randn(64, 3, 8, 8, generator=g)
        images += 2 * torch.randn(4, 3, 1, 1, generator=g)[labels]
        self.set = TensorDataset(images, labels)

    def train_dataloader(self):
        return DataLoader(self.set, 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.set, 32)


RECIPE = {
    "model": f"{__name__}:net",
    "data": f"{__name__}:Data",
    "task": "classification",
    "rewrite": ["focus-to-conv", "silu-to-hardswish"],
    "export": ["torch"],
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
}


def test_a_run_rewrites_trains_and_saves(tmp_path):
    lines = []
    prune = {"target": {"flops": 0.6}, "during": [0.0, 0.5], "batchnorm_batches": 0}
    recipe = Recipe.parse({**RECIPE, "prune": prune, "distill": {"teacher": "ema"}})
    release, timing = run(recipe, tmp_path / "small", say=lines.append)
    assert "rewriting" in timing.seconds
    exact, approximate = release.rewriting.done
    assert exact.metric is None
    assert approximate.metric is not None
    assert any("focus-to-conv" in line and "exact, verified" in line for line in lines)
    again = slimkit.load(tmp_path / "small")
    assert again.conv.kernel_size == (6, 6)
    assert again.body.out_channels < 24
    content = json.loads((tmp_path / "small" / "slimkit.json").read_text())
    assert [one["name"] for one in content["metrics"]["rewriting"]] == RECIPE["rewrite"]
    labels = {row["label"] for row in content["metrics"]["rows"]}
    assert "rewritten + pruned + distilled" in labels
    page = (tmp_path / "small" / "report.html").read_text()
    assert "Rewritten for the target" in page
    assert f"{min(approximate.sqnr_db):.1f} dB" in page
    del content["metrics"]["rewriting"]  # an artifact of old
    write_report(tmp_path / "old.html", content["metrics"], "")
    assert "Rewritten for the target" not in (tmp_path / "old.html").read_text()


def test_a_rewrite_makes_a_model_run_where_it_could_not(tmp_path, monkeypatch):
    def check(_self, deployable):
        code = deployable.program.graph_module.code
        return ["it has no pixel_unshuffle"] if "pixel_unshuffle" in code else []

    monkeypatch.setattr(Reference, "check", check)
    lines = []
    recipe = Recipe.parse({**RECIPE, "prune": {"target": {"flops": 0.6}}, "distill": False})
    release, _ = run(recipe, tmp_path / "small", say=lines.append)
    assert any("torch cannot run the model as it was before it was rewritten" in s for s in lines)
    dense, small = release.rows
    assert small.macs < 0.65 * dense.macs
    with pytest.raises(SlimkitError, match="torch: it has no pixel_unshuffle"):
        run(recipe.model_copy(update={"rewrite": ()}), tmp_path / "other", say=lines.append)


def test_the_dense_model_stays_as_it_was():
    module = slimkit.SlimModule(net(), RECIPE)
    x = torch.randn(2, 3, 8, 8)
    expected = net().eval()(x)
    module.rewrite_(x)
    assert torch.equal(module.dense(x), expected)
    assert module.network.conv.in_channels == 3
    assert not torch.equal(module.network(x), expected)


def test_an_own_trainer_must_rewrite_first():
    module = slimkit.SlimModule(net(), RECIPE)
    with pytest.raises(slimkit.SlimkitError, match=r"call module.rewrite_\(example_inputs\)"):
        module.setup("fit")
    module.rewrite_(torch.randn(2, 3, 8, 8))
    module.setup("fit")


def test_a_scan_is_of_the_rewritten_network():
    from slimkit.training.scan import trained

    model, _ = trained(Recipe.parse(RECIPE), print)
    assert model.conv.in_channels == 3


def test_a_checkpoint_from_before_the_cut_loads_into_the_rewritten_network():
    prune = {"target": {"flops": 0.6}, "during": [0.0, 0.5], "batchnorm_batches": 0}
    x = torch.randn(2, 3, 8, 8)
    modules = [slimkit.SlimModule(net(), {**RECIPE, "prune": prune}) for _ in range(2)]
    for module in modules:
        module.rewrite_(x)
    checkpoint = {"state_dict": modules[0].state_dict()}
    modules[0].on_save_checkpoint(checkpoint)
    pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
        modules[1], Data()
    )
    assert modules[1].network.body.out_channels < 24
    modules[1].on_load_checkpoint(checkpoint)
    modules[1].load_state_dict(checkpoint["state_dict"])
    assert modules[1].network.conv.weight.shape == (16, 3, 6, 6)
    assert torch.equal(modules[1].network.eval()(x), modules[0].network.eval()(x))


def test_only_the_named_part_is_rewritten():
    class Whole(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.net = nn.SiLU(), net()

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.net(self.before(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    recipe = {k: v for k, v in RECIPE.items() if k != "task"} | {"network": "net"}
    module = slimkit.SlimModule(Whole(), recipe)
    batch = next(iter(Data().train_dataloader()))
    report = module.rewrite_(module.entry(batch), [batch])
    assert [one.places for one in report.done] == [1, 2]
    assert isinstance(module.inner.before, nn.SiLU)
    assert module.inner.net.conv.kernel_size == (6, 6)
