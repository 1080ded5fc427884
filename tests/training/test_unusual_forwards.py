"""LightningModules whose network comes late, or takes something else than tensors in order."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from little_project import MODULE
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from slimkit import SlimModule
from slimkit.errors import SlimkitError

X, Y = torch.randn(32, 3, 8, 8), torch.arange(32) % 4


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)
    )


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def loss(self, batch) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Late(Plain):
    """Builds its network when Lightning says so, as large models do."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.model = None

    def configure_model(self) -> None:
        self.model = net()


class Both(Plain):
    """Has its network already, and leaves it."""

    def configure_model(self) -> None:
        if self.model is None:
            self.model = net()


class Anew(Plain):
    """Has its weights already, and loses them."""

    def configure_model(self) -> None:
        self.model = net()


class Loose(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False


class Images(Plain):
    """Takes a list of images, as torchvision's detectors do."""

    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.cat([self.model(image[None]) for image in images])

    def loss(self, batch) -> Tensor:
        return functional.cross_entropy(self(list(batch[0])), batch[1])


class Named(Plain):
    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(inputs["pixels"])

    def loss(self, batch) -> Tensor:
        return functional.cross_entropy(self(pixels=batch[0]), batch[1])


def fitted(module: pl.LightningModule, recipe: dict) -> SlimModule:
    slim = SlimModule(module, {"distill": False, **recipe})
    loader = DataLoader([*zip(X, Y, strict=True)], 8)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(slim, loader, loader)
    return slim


PRUNE = {"prune": {"criterion": "l1", "target": {"flops": 0.6}}}
QUANTIZE = {"quantize": {"train_from": 0.5}}
ignored = pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*log_every_n_steps")


@ignored
@pytest.mark.parametrize("kind", [Late, Both, Loose])
@pytest.mark.parametrize("recipe", [PRUNE, QUANTIZE])
def test_networks_that_come_late_or_load_loosely_are_taken(kind, recipe) -> None:
    slim = fitted(kind(), recipe)
    assert slim.state.cut if "prune" in recipe else slim.fake.state == "quantize"
    assert slim.inner.model is slim.network.model


class Compared(Plain):
    """Subtracts what the other samples of a batch have in common."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        return x - x.mean(0)


@ignored
def test_samples_that_depend_on_each_other_are_said_at_the_first_batch() -> None:
    steps = []
    model = Compared()
    model.register_forward_pre_hook(lambda module, _: steps.append(1) if module.training else None)
    with pytest.raises(SlimkitError, match="something else of a sample alone than of two"):
        fitted(model, QUANTIZE)
    assert steps == []


class Waiting(Plain):
    """Builds its network by what a Trainer knows."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.model = None

    def configure_model(self) -> None:
        self.model = net() if self.trainer.max_epochs else nn.Identity()


def test_a_network_that_waits_for_a_trainer_is_refused_with_the_way_out() -> None:
    with pytest.raises(SlimkitError, match="configure_model of Waiting fails before there is a T"):
        SlimModule(Waiting(), PRUNE)


RECIPE = """
model: late:Late
network: net
data: late:Data
prune: {target: {flops: 0.6}}
export: [torch]
trainer: {max_epochs: 1, accelerator: cpu}
"""
LATE = (
    MODULE
    + """
import pytorch_lightning as pl


class Late(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        self.net = net()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)
"""
)


def test_a_recipe_of_a_network_that_comes_late_runs_and_loads(tmp_path, here) -> None:
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = here(tmp_path, "run", "recipe.yaml", "-o", "small")
    assert done.returncode == 0, done.stderr
    done = here(tmp_path, "compare", "small")
    assert done.returncode == 0, done.stderr
    assert here(tmp_path, "check", "recipe.yaml", "--targets").returncode == 0


@ignored
def test_weights_are_not_lost_to_a_second_network() -> None:
    with pytest.raises(SlimkitError, match="configure_model of Anew builds another network"):
        fitted(Anew(), PRUNE)


@ignored
@pytest.mark.parametrize("recipe", [PRUNE, QUANTIZE])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Images, "does not run on the first sample of a batch alone .* list of images"),
        (Named, "called with pixels by name, which its forward takes in no other way"),
    ],
)
def test_other_arguments_want_the_part_that_takes_tensors(kind, said: str, recipe) -> None:
    with pytest.raises(SlimkitError, match=said) as caught:
        fitted(kind(), recipe)
    assert "network:" in str(caught.value)
    slim = fitted(kind(), {**recipe, "network": "model"})
    assert slim.state.cut if "prune" in recipe else slim.fake.state == "quantize"
