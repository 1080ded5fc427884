"""What cannot be rounded stays in float by itself: masks of infinity, weights that are buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiled import sqnr
from nets import normal
from torch import Tensor, nn

import slimkit
from slimkit.errors import QuantizationError

X = normal(8, 6, 16)


class Causal(nn.Module):
    """One head of attention in which no position reads a later one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.register_buffer("mask", torch.triu(torch.full((6, 6), -torch.inf), 1))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 4
        if self.how == "add":
            scores = scores + self.mask
        else:
            scores = scores.masked_fill(self.mask < 0, -torch.inf)
        return scores.softmax(-1) @ self.v(x)


@pytest.mark.parametrize("how", ["add", "fill"])
def test_a_causal_mask_stays_in_float_and_the_layers_do_not(how: str, tmp_path: Path) -> None:
    net = Causal(how).eval()
    int8 = slimkit.quantize(net, [X], activations="minmax").eval()
    skipped = int8.fake.sites.skipped
    masked = [name for name, why in skipped.items() if "minus infinity, as masks" in why]
    assert any("softmax" in name for name in masked)
    assert len(int8.fake.sites.weights) == 3
    with torch.no_grad():
        changed = X.clone()
        changed[:, 3:] = 0  # what positions 0, 1 and 2 must not see
        torch.testing.assert_close(int8(X)[:, :3], int8(changed)[:, :3])
        assert sqnr(net(X), int8(X)) > 30
    artifact = slimkit.export(int8, X, directory=tmp_path / "a")
    assert sqnr(int8(X).detach(), artifact.run(X)) > 45  # a tie may fall either way


class Padded(Causal):
    """Positions behind the length of each sample are not read; the first sample has all."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 4
        padding = torch.arange(6)[None] >= lengths[:, None]
        return scores.masked_fill(padding[:, None], -torch.inf).softmax(-1) @ self.v(x)


def test_a_mask_that_only_later_samples_have_is_found() -> None:
    lengths = torch.tensor([6, 5, 4, 3, 2, 6, 6, 1])
    int8 = slimkit.quantize(Padded("pad").eval(), [((X, lengths),)], activations="minmax")
    assert any("minus infinity" in why for why in int8.fake.sites.skipped.values())
    assert int8(X, lengths).isfinite().all()


def test_the_ranges_are_of_the_calibration_only() -> None:
    """Looking for infinity observes nothing: a range is that of the given batch."""
    net = nn.Sequential(nn.Linear(16, 4)).eval()
    (name,) = slimkit.quantize(net, [X], "ncnn", activations="minmax").fake.sites.activations
    found = slimkit.quantize(net, [X[:1] * 9, X * 0.1], "ncnn", activations="minmax").fake[name]
    assert float(found.qparams()[0]) == pytest.approx(float(X[:1].abs().max()) * 9 / 127)


def test_nan_is_refused_still() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).sqrt())

    with pytest.raises(QuantizationError, match="gives NaN or infinity in float"):
        slimkit.quantize(Root(), [X])


def test_a_buffer_as_weight_stays_in_float_with_the_reason() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("filters", torch.randn(16, 16))
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(nn.functional.linear(x, self.filters).relu())

    int8 = slimkit.quantize(Fixed().eval(), [X], "ncnn")
    assert [path for _, path in int8.fake.sites.weights.values()] == ["layer.weight"]
    assert int8.fake.sites.skipped[":linear:0"].startswith("its weight is a buffer: make it a")


def test_a_model_without_parameters_is_refused_in_words() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("filters", torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.filters)

    with pytest.raises(QuantizationError, match=r":linear:0: its weight is a buffer"):
        slimkit.quantize(Bare(), [X])
