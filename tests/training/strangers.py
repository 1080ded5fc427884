"""Losses of strangers, as the registry gives them, without a package of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimkit.interfaces import DistillationLoss
from slimkit.registry import Listed, Registry, discover


class Plain(DistillationLoss):
    """As plugins were written before losses could ask for anything: two arguments."""

    def forward(self, student, teacher):
        return (student - teacher).abs().mean()


class NotANumber(Plain):
    def forward(self, student, teacher):
        return (student - teacher).mean() * float("nan")


class PerSample(Plain):
    def forward(self, student, teacher):
        return (student - teacher).abs().mean(1)


class Number(Plain):
    def forward(self, student, teacher):
        return 0.5


class Detached(Plain):
    def forward(self, student, teacher):
        return (student.detach() - teacher).abs().mean()


class Elsewhere(Plain):
    """Has a gradient, but not to the student."""

    def forward(self, student, teacher):
        return (teacher - torch.ones(1, requires_grad=True)).abs().mean()


class Greedy(Plain):
    needs = frozenset({"images"})


class Scaled(Plain):
    """A learned factor for each of the student's channels."""

    student_channels = {"scale": 0}

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        self.scale = torch.nn.Parameter(torch.ones(student.shape[1]))

    def forward(self, student, teacher):
        shape = (1, -1, *[1] * (student.dim() - 2))
        return ((student * self.scale.reshape(shape)).mean(1) - teacher.mean(1)).square().mean()


LOSSES = (Plain, NotANumber, PerSample, Number, Detached, Elsewhere, Greedy, Scaled)


@pytest.fixture
def strangers(monkeypatch):
    """Registers `LOSSES` by their names in lower case."""
    listed = tuple(
        Listed("loss", kind.__name__.lower(), f"strangers:{kind.__name__}", "", "theirs", "1.0")
        for kind in LOSSES
    )
    registry = Registry((*discover().plugins, *listed))
    for module in ("slimkit.training.comparison", "slimkit.registry"):
        monkeypatch.setattr(f"{module}.discover", lambda: registry)
