"""Quantization-aware training on two processes: ranges and learned steps are the same on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # each starts two processes

SCRIPT = """
import sys
import warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl
import torch
from lit import Batches, Lit
from torch.utils.data import DataLoader
import slimkit
from slimkit import SlimModule

mode, folder, checkpoint = sys.argv[1:4]


class Data(Batches):
    def train_dataloader(self):
        return DataLoader(self.train, 4)  # Lightning gives each process its share


class Stray(pl.Callback):
    # one process whose weights are not the others'
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if mode == "stray" and trainer.global_rank == 1 and trainer.global_step == 2:
            with torch.no_grad():
                module.network.net[0].weight.mul_(2)


class Keep(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        if mode != "resumed" and trainer.current_epoch == 1:
            trainer.save_checkpoint(folder + "/middle.ckpt")


quantize = {"train_from": 0.25, "weights": "lsq", "activations": "lsq"}
if mode == "follow":
    quantize = {"train_from": 0.25, "activations": "minmax", "observe": "always"}
elif mode in ("whole", "resumed"):
    quantize |= {"freeze_ranges_at": 0.75}
module = SlimModule(Lit(), {"quantize": quantize, "distill": False})
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    num_sanity_val_steps=0, callbacks=[Stray(), Keep()],
)
trainer.fit(module, Data(), ckpt_path=checkpoint if checkpoint != "-" else None)
torch.save(module.state_dict(), f"{folder}/{mode}{trainer.global_rank}.pt")
"""


def train(folder: Path, mode: str, checkpoint: str = "-") -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(script), mode, str(folder), checkpoint],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent)
            + os.pathsep
            + str(Path(__file__).parent),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )


def states(folder: Path, mode: str) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"{mode}{rank}.pt") for rank in range(2)]


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(two)
    different = [k for k, v in one.items() if not torch.equal(v, two[k]) and "val_acc" not in k]
    assert different == []


def test_learned_ranges_are_trained_alike_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    done = train(tmp_path, "whole")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = states(tmp_path, "whole")
    assert_same(one, two)
    learned = [v for k, v in one.items() if k.endswith(".ratio")]
    assert len(learned) > 4
    assert all((v != 1).any() for v in learned)
    done = train(tmp_path, "resumed", str(tmp_path / "middle.ckpt"))
    assert done.returncode == 0, done.stderr[-2000:]
    again, other = states(tmp_path, "resumed")
    assert_same(again, other)
    assert_same(one, again)


def test_ranges_that_follow_the_data_are_those_of_the_first_process(tmp_path: Path) -> None:
    done = train(tmp_path, "follow")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(*states(tmp_path, "follow"))


def test_a_process_whose_weights_differ_is_named(tmp_path: Path) -> None:
    done = train(tmp_path, "stray")
    assert done.returncode != 0
    assert "process 1 has another range than process 0 at net/0/weight:weight" in done.stderr
