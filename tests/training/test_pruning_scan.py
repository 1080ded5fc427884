"""The scan driven by a recipe: what it measures, what it draws, and what the recipe makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lit import Batches, Lit
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from slimkit.errors import PruningError, SlimkitError
from slimkit.pruning.sensitivity import Divergence, LossIncrease
from slimkit.recipe import Recipe
from slimkit.training.entering import Entry
from slimkit.training.measure import measure_of
from slimkit.training.module import SlimModule
from slimkit.training.pruning_scan import curves_of, drawn, scan_pruning
from slimkit.training.run import run

PRUNE = {"criterion": "l1", "target": {"flops": 0.5}, "ratios": "sensitivity"}


def labels_of(loader) -> list[int]:
    return [int(label) for batch in loader for label in batch[-1]]


def test_samples_are_drawn_in_one_random_order() -> None:
    data = TensorDataset(torch.randn(200, 2), torch.arange(200))
    said: list[str] = []
    first = labels_of(drawn(DataLoader(data, 100), 0, None, said.append))
    assert sorted(first) == list(range(200))
    assert first != list(range(200))
    assert labels_of(drawn(DataLoader(data, 50, shuffle=True), 0, None, said.append)) == first
    assert labels_of(drawn([DataLoader(data, 100)], 0, 30, said.append)) == first[:30]
    assert labels_of(drawn(DataLoader(data, 100), 1, None, said.append)) != first
    assert said == []


def test_a_stream_comes_as_it_is_and_that_is_said() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter((torch.zeros(3), i) for i in range(10))

    said: list[str] = []
    batches = drawn(DataLoader(Stream(), 4), 0, 5, said.append)
    assert len(batches) == 2
    assert labels_of(batches) == list(range(8))
    assert "cannot be drawn from at random" in said[0]


class Silent(Lit):
    def validation_step(self, batch, batch_idx):
        self.log("val_acc", self(batch[0]).argmax(1).eq(batch[1]).float().mean())


class Returned(Lit):
    def validation_step(self, batch, batch_idx):
        return {"loss": self.criterion(self(batch[0]), batch[1])}


class Broken(Lit):
    def validation_step(self, batch, batch_idx):
        raise RuntimeError("no")


def test_the_measure_is_the_loss_that_the_module_has(monkeypatch) -> None:
    batch = next(iter(Batches().val_dataloader()))
    for kind in (Lit, Returned):
        module, said = kind().eval(), []
        measure = measure_of(Entry(module), batch, said.append)
        assert isinstance(measure, LossIncrease)
        assert said == []
        wanted = torch.nn.functional.cross_entropy(module(batch[0]), batch[1])
        assert measure.values(batch).item() == pytest.approx(wanted.item())
    for kind, reason in ((Silent, "neither returns nor logs a loss"), (Broken, "no")):
        said = []
        module = kind().eval()
        assert isinstance(measure_of(Entry(module), batch, said.append), Divergence)
        assert reason in said[0]


@pytest.mark.parametrize("kind", [Lit, Silent])
def test_a_lightning_module_is_scanned_and_stays_as_it_is(tmp_path, kind) -> None:
    module = SlimModule(kind(), {"prune": PRUNE})
    before = {name: t.clone() for name, t in module.network.state_dict().items()}
    said: list[str] = []
    curves = curves_of(module, Batches(), tmp_path, say=said.append)
    assert [curve.group for curve in curves] == ["net.0", "net.3"]
    assert max(p.increase for curve in curves for p in curve.points) > 0
    assert {p.samples for curve in curves for p in curve.points if p.removed} == {8}
    after = module.network.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert curves_of(module, Batches(), tmp_path, say=said.append) == curves
    assert any("results are known" in line for line in said)


class NoValidation(Batches):
    val_dataloader = pl.LightningDataModule.val_dataloader


def recipe(**more) -> Recipe:
    return Recipe.parse(
        {
            "model": {"target": "lit:Lit", "options": {"wide": 2}},
            "data": "lit:Batches",
            "prune": PRUNE,
            "distill": False,
            "trainer": {"max_epochs": 0, "accelerator": "cpu"},
            **more,
        }
    )


def test_without_validation_data_or_prune_section_it_says_so(tmp_path, monkeypatch) -> None:
    import lit

    given = {"samples": None, "precision": 0.3, "say": print}
    with pytest.raises(SlimkitError, match="no prune section"):
        scan_pruning(recipe(prune=None), tmp_path, **given)
    monkeypatch.setattr(lit, "Batches", NoValidation)
    with pytest.raises(SlimkitError, match="no validation loader"):
        scan_pruning(recipe(), tmp_path, **given)


def test_a_run_without_validation_data_stops_before_any_training(tmp_path, monkeypatch) -> None:
    import lit

    class TestOnly(NoValidation):
        test_dataloader = Batches.val_dataloader

    monkeypatch.setattr(lit, "Batches", TestOnly)
    monkeypatch.setattr("slimkit.training.run._pretrained", None)
    with pytest.raises(SlimkitError, match="which prune.ratios: sensitivity measures on"):
        run(recipe(), tmp_path / "out", say=print)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_scans_first_and_shares_the_target_out(tmp_path, monkeypatch, epochs) -> None:
    from slimkit.training import run as running

    made = []
    monkeypatch.setattr(running, "deploy", lambda module, *_: made.append(module))
    said: list[str] = []
    asked = recipe(trainer={"max_epochs": epochs, "accelerator": "cpu", "logger": False})
    run(asked, tmp_path / "out", say=said.append)
    found = made[0]
    assert [curve.group for curve in found.curves] == ["net.0", "net.3"]
    before, left = found.network.slimkit_pruning.macs
    assert left / before <= 0.51
    folder = tmp_path / "out-sensitivity"
    assert {"pruning.jsonl", "pruning.csv", "pruning.png"} <= {f.name for f in folder.iterdir()}
    run(asked, tmp_path / "out", say=said.append, fresh=True)
    assert any("results are known" in line for line in said)
    assert made[1].curves == found.curves


def test_training_by_hand_says_where_the_scan_comes_from() -> None:
    from lit import fit

    with pytest.raises(PruningError, match="needs a scan: start the recipe with `slimkit run`"):
        fit(SlimModule(Lit(), {"prune": PRUNE, "distill": False}))


@pytest.mark.slow  # starts two processes
def test_two_processes_share_the_groups_and_find_what_one_does(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")])
    text = """
model: {target: "lit:Lit", options: {wide: 2}}
data: lit:Batches
prune: {criterion: l1, target: {flops: 0.5}}
trainer: {accelerator: cpu, devices: %d, strategy: %s}
"""
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp")):
        where = tmp_path / str(devices)
        path = tmp_path / f"{devices}.yaml"
        path.write_text(text % (devices, strategy))
        done = subprocess.run(
            [sys.executable, "-m", "slimkit", "sensitivity", str(path), "-o", str(where)],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("2 groups") == 1
        found.append((where / "pruning.json").read_text())
    assert found[0] == found[1]
    assert (where / "pruning.2-of-2.jsonl").is_file()
    assert (where / "pruning.jsonl").is_file()
