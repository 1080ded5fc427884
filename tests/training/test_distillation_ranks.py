"""Distillation on two processes: what losses and peers learn is the same on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # starts two processes

SCRIPT = """
import sys
import warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl
import torch
from lit import Batches, Lit
from torch.utils.data import DataLoader
from slimkit import SlimModule

folder, checkpoint = sys.argv[1:3]


class Data(Batches):
    def train_dataloader(self):
        return DataLoader(self.train, 4)  # Lightning gives each process its share


class Keep(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        if checkpoint == "-" and trainer.current_epoch == 0:
            trainer.save_checkpoint(folder + "/middle.ckpt")


def state(module):
    distillation = module.distillation[0]
    found = dict(module.state_dict())
    for name, parameter in distillation.parameters().items():
        found["loss." + name] = parameter.detach()
    for n, teacher in enumerate(distillation.teachers):
        found |= {f"teacher{n}.{k}": v for k, v in teacher.network.state_dict().items()}
    return found


TEACHERS = {"hint": ["dense", "ema"], "peer": "mutual"}
LOSSES = {"hint": ["kl", {"name": "hint", "at": "net.5"}], "peer": ["kl"]}
kind = sys.argv[3]
section = {"teacher": TEACHERS[kind], "losses": LOSSES[kind]}
module = SlimModule(Lit(), {"quantize": {}, "distill": section})
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    num_sanity_val_steps=0, callbacks=[Keep()],
)
trainer.fit(module, Data(), ckpt_path=checkpoint if checkpoint != "-" else None)
name = "whole" if checkpoint == "-" else "resumed"
torch.save(state(module), f"{folder}/{name}{trainer.global_rank}.pt")
"""


def train(folder: Path, kind: str, checkpoint: str = "-") -> None:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(script), str(folder), checkpoint, kind],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
            ),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """But for metrics and the statistics of batch-norm, which each process has of its batches."""
    assert list(one) == list(two)
    own = ("val_acc", "running_", "num_batches")
    shared = [k for k in one if not any(part in k for part in own)]
    assert [k for k in shared if not torch.equal(one[k], two[k])] == []


@pytest.mark.parametrize("kind", ["hint", "peer"])
def test_what_is_learnt_is_alike_and_a_resumed_run_goes_on(tmp_path: Path, kind: str) -> None:
    train(tmp_path, kind)
    train(tmp_path, kind, str(tmp_path / "middle.ckpt"))
    whole, resumed = (
        [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        for name in ("whole", "resumed")
    )
    assert_same(*whole)
    assert_same(*resumed)
    assert any(k.startswith("loss.") or "teacher0" in k for k in whole[0])
    own = [k for k in whole[0] if "running_" not in k and "num_b" not in k and "val_acc" not in k]
    for k in own:
        torch.testing.assert_close(resumed[0][k], whole[0][k], rtol=1e-4, atol=1e-5, msg=k)
