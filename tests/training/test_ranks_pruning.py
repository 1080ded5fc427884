"""Pruning on two processes: both keep the same channels, and those that one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

SCRIPT = """
import json
import os
import sys
import warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl
import torch
from lit import Batches, Lit
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from slimkit import SlimModule
from slimkit.training.processes import part

mode, prune, devices, folder, checkpoint = sys.argv[1:6]
prune, devices = json.loads(prune), int(devices)


class Data(Batches):
    def train_dataloader(self):  # the same 8 samples at a time in any case
        if devices == 1:
            return DataLoader(self.train, 8)
        mine = DistributedSampler(self.train, shuffle=False)
        return DataLoader(self.train, 8 // devices, sampler=mine)


class Plain(Lit):
    # without batch-norm, whose statistics are each process's own
    def __init__(self):
        super().__init__(lr=0.01)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
            )


class Keep(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        if mode == "whole":
            trainer.save_checkpoint(f"{folder}/{trainer.current_epoch}.ckpt")


if mode == "stray" and os.environ.get("LOCAL_RANK") == "1":
    prune["target"] = {"flops": 0.9}
pl.seed_everything(0, verbose=False)
module = SlimModule(Lit() if mode == "norms" else Plain(), {"prune": prune})
trainer = pl.Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=4,
    logger=False, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, num_sanity_val_steps=0, callbacks=[Keep()],
    use_distributed_sampler=False,
)
trainer.fit(module, Data(), ckpt_path=checkpoint if checkpoint != "-" else None)
part()  # gloo's threads may abort a process that ends without
momenta = [s["momentum_buffer"] for s in trainer.optimizers[0].state.values()]
torch.save(
    {"state": module.state_dict(), "kept": module.state.living, "momenta": momenta},
    f"{folder}/{mode}{devices}{trainer.global_rank}.pt",
)
"""

SCRIPTS = Path(sys.executable).parent
CHANNELS = {"round_to": 1, "target": {"flops": 0.5}, "during": [0.1, 0.6], "steps": 3}
WEIGHTS = {"granularity": "element", "target": {"ratio": 0.6}, "during": [0.1, 0.6], "steps": 3}


def fit(
    folder: Path, mode: str, devices: int = 2, *, checkpoint: str = "-", **prune: Any
) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    section = json.dumps({**(prune or CHANNELS)})
    return subprocess.run(
        [sys.executable, str(script), mode, section, str(devices), str(folder), checkpoint],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def found(folder: Path, mode: str, devices: int = 2) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{mode}{devices}{rank}.pt") for rank in range(devices)]


def assert_close(one: dict[str, Any], two: dict[str, Any], tolerance: float = 0.0) -> None:
    assert {n: k.tolist() for n, k in one["kept"].items()} == {
        n: k.tolist() for n, k in two["kept"].items()
    }
    assert list(one["state"]) == list(two["state"])
    for name, value in one["state"].items():
        if "val_acc" not in name:
            torch.testing.assert_close(
                value, two["state"][name], rtol=tolerance, atol=tolerance, msg=name
            )
    for mine, theirs in zip(one["momenta"], two["momenta"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def run(folder: Path, *arguments: Any, **options: Any) -> None:
    done = fit(folder, *arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_end_as_one_does_and_a_resumed_run_as_they_do(tmp_path: Path) -> None:
    """The cut changes shapes that DDP knows: it must meet them anew, and train all of them."""
    prune = {**CHANNELS, "criterion": "taylor"}
    run(tmp_path, "whole", 1, **prune)
    run(tmp_path, "whole", 2, **prune)
    (one,) = found(tmp_path, "whole", 1)
    first, second = found(tmp_path, "whole")
    assert sum(map(len, first["kept"].values())) < 20
    assert_close(first, second)
    assert_close(one, first, 1e-4)
    # the second epoch ends in the window, the third after the cut
    run(tmp_path, "resumed", checkpoint=str(tmp_path / "1.ckpt"), **prune)
    assert_close(first, found(tmp_path, "resumed")[0])


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [CHANNELS, WEIGHTS], ids=["channels", "weights"])
@pytest.mark.parametrize("criterion", ["wanda", "hessian", "activation"])
def test_what_is_measured_is_that_of_all_processes(
    tmp_path: Path, criterion: str, granularity: dict[str, Any]
) -> None:
    if criterion == "activation" and granularity is WEIGHTS:
        pytest.skip("it scores whole channels")
    prune = {**granularity, "criterion": criterion}
    run(tmp_path, "whole", 1, **prune)
    run(tmp_path, "whole", 2, **prune)
    first, second = found(tmp_path, "whole")
    assert_close(first, second)
    assert_close(found(tmp_path, "whole", 1)[0], first, 1e-4)
    run(tmp_path, "resumed", checkpoint=str(tmp_path / "2.ckpt"), **prune)
    assert_close(first, found(tmp_path, "resumed")[0])


@pytest.mark.slow
def test_batch_norm_settles_alike(tmp_path: Path) -> None:
    run(tmp_path, "norms")
    first, second = found(tmp_path, "norms")
    for name, value in first["state"].items():
        if "running" not in name and "tracked" not in name and "val_acc" not in name:
            assert torch.equal(value, second["state"][name]), name


@pytest.mark.slow
def test_a_process_that_keeps_other_channels_is_named(tmp_path: Path) -> None:
    done = fit(tmp_path, "stray")
    assert done.returncode != 0
    assert "process 1 has another choice of what stays than process 0 at net.0" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "srun"])
def test_a_recipe_runs_on_two_processes_and_one_of_them_exports(
    tmp_path: Path, launcher: str
) -> None:
    recipe = {
        "model": {"target": "lit:Lit", "options": {"wide": 2}},
        "data": "lit:Batches",
        "prune": {"target": {"flops": 0.6}, "ratios": "sensitivity"},
        "export": ["onnxruntime"],
        "metric": "val_acc",
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 2, "strategy": "ddp"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    here = Path(__file__).parent
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    command = [str(SCRIPTS / "slimkit"), "run", "recipe.yaml", "--output", "out", "--json"]
    launch = {
        "lightning": [],
        "torchrun": [str(SCRIPTS / "torchrun"), "--nproc-per-node", "2", "--no-python"],
        "srun": [sys.executable, str(Path(__file__).with_name("like_srun.py"))],
    }
    done = subprocess.run(
        [*launch[launcher], *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["rows"]
    assert done.stderr.count("exporting, running and measuring") == 1
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "out.rejected").exists()
