"""Plugins of three packages work together in one recipe, and every one of them is on record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from installing import installed, without_limit

from slimkit.scaffold.naming import Names
from slimkit.scaffold.package import write_package

CODE = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 2))


class Data(pl.LightningDataModule):
    def loader(self):
        x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=16)

    train_dataloader = val_dataloader = test_dataloader = loader
"""

RECIPE = """
model: their_code:net
data: their_code:Data
task: classification
prune: {criterion: {name: my-criterion, options: {power: 2.0}}, target: {flops: 0.7}}
distill: {losses: [{name: my-loss, at: output}]}
quantize: {weights: minmax, activations: {name: my-quantizer, options: {share: 0.9}}}
export: [torch]
trainer: {max_epochs: 1, accelerator: cpu, devices: 1, logger: false}
"""


@pytest.mark.slow  # a whole run: imports, training, export, measurement
def test_plugins_of_three_packages_run_in_one_recipe(tmp_path):
    path = [str(Path(__file__).parents[2]), str(tmp_path / "site")]
    for kind in ("criterion", "quantizer", "loss"):
        package = write_package(Names(kind, f"my-{kind}"), tmp_path)
        installed(package, tmp_path / "site")
        path.append(str(package / "src"))
    (tmp_path / "their_code.py").write_text(CODE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for command in ("check", "run"):
        done = subprocess.run(
            [sys.executable, "-m", "slimkit", command, "recipe.yaml"],
            cwd=tmp_path,
            env={**without_limit(), "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    artifact = tmp_path / "runs" / "recipe"
    recorded = json.loads((artifact / "slimkit.json").read_text())["plugins"]
    theirs = {(p["name"], p["package"], p["version"]) for p in recorded if "my-" in p["name"]}
    assert theirs == {
        (f"my-{kind}", f"slimkit-my-{kind}", "0.1.0") for kind in ("criterion", "quantizer", "loss")
    }
    page = (artifact / "report.html").read_text()
    assert "<td>my-quantizer</td><td>slimkit-my-quantizer</td><td>0.1.0</td>" in page
