"""What every function that takes a model refuses, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slimkit
from slimkit.acceptance import check_samples
from slimkit.errors import SlimkitError

X = torch.randn(4, 8)
CALLS = {
    "prune": lambda model, folder: slimkit.prune(model, X, target={"flops": 0.5}),
    "quantize": lambda model, folder: slimkit.quantize(model, [X]),
    "export": lambda model, folder: slimkit.export(model, X, "torch", directory=folder / "a"),
    "preflight": lambda model, folder: slimkit.preflight(model, X, "torch"),
    "rewrite": lambda model, folder: slimkit.rewrite(model, X, ["silu-to-hardswish"]),
    "save": lambda model, folder: slimkit.save(model, folder / "a"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear, "takes a model, not its class: call Linear"),
        ("net.pt", "takes an nn.Module, not str: build the model"),
        ({"weight": X}, "takes an nn.Module, not dict"),
        (None, "takes an nn.Module, not NoneType"),
    ],
)
def test_what_is_no_model_is_said(name: str, model: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(SlimkitError, match=f"{name} {said}"):
        CALLS[name](model, tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["quantize", "export", "preflight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_said(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(SlimkitError, match=r"weight of the model is in \w+: .* model\.float\(\)"):
        CALLS[name](nn.Linear(8, 4).to(dtype), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_buffers_may_have_another_precision(tmp_path: Path) -> None:
    model = nn.Linear(8, 4)
    model.register_buffer("classes", torch.arange(4, dtype=torch.float64))
    CALLS["export"](model, tmp_path)


@pytest.mark.parametrize("data", [None, 5, nn.Linear(8, 4)])
def test_calibration_wants_batches(data: object) -> None:
    with pytest.raises(SlimkitError, match="data must give batches to calibrate on .*, not"):
        slimkit.quantize(nn.Linear(8, 4), data)


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Centred(nn.Module):
    """Looks at the other samples of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Pairs(nn.Module):
    """Gives as many rows as there are pairs of samples, which no file can."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] * x[None]).flatten(0, 1)


@pytest.mark.parametrize("name", ["export", "preflight"])
@pytest.mark.parametrize("model", [Recurrent(batch_first=False), Centred()])
def test_a_model_that_mixes_samples_is_refused(name: str, model, tmp_path: Path) -> None:
    x = torch.randn(5, 3, 8)
    calls = {
        "export": lambda: slimkit.export(model, x, "torch", directory=tmp_path / "a"),
        "preflight": lambda: slimkit.preflight(model, x, "torch"),
    }
    with pytest.raises(SlimkitError, match="something else of a sample alone than of two together"):
        calls[name]()
    assert not [*tmp_path.iterdir()]


def test_time_may_lie_behind_the_samples() -> None:
    check_samples(Recurrent(batch_first=True), (torch.randn(5, 3, 8),))


def test_one_sample_tells_nothing_and_other_outputs_are_no_samples() -> None:
    check_samples(Recurrent(batch_first=False), (torch.randn(1, 3, 8),))
    check_samples(Pairs(), (X,))


def test_what_draws_at_random_is_not_said_to_mix_samples() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(SlimkitError, match="gives something else each time"):
        check_samples(Drawing(), (X,))


def test_batch_norm_is_looked_at_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    check_samples(model, (X,))
    assert model.training
    assert model[1].num_batches_tracked == 0


def test_a_forward_may_write_into_its_inputs(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.sub_(1.0).clamp_(0.0))

    x = X.clone()
    check_samples(Shifted(), (x,))
    assert torch.equal(x, X)
    slimkit.preflight(Shifted(), x, "torch", quantized=False)
    assert torch.equal(x, X)


def test_outputs_may_be_empty() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, None, :0]

    check_samples(Nothing(), (X,))


def test_inputs_that_do_not_go_together_in_twos_are_said() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(4, 2, 4)

    with pytest.raises(SlimkitError, match="dimension 0 of each must count samples"):
        check_samples(Fixed(), (X,))


class Noisy(nn.Module):
    """Forgets to draw in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(self.a(x).relu(), 0.3))


@pytest.mark.parametrize("name", ["prune", "export", "preflight"])
def test_a_model_that_is_random_in_evaluation_is_refused_as_such(name: str, tmp_path: Path) -> None:
    noisy = Noisy()
    state = torch.random.get_rng_state()
    with pytest.raises(SlimkitError, match="Noisy gives something else each time it runs in eval"):
        CALLS[name](noisy, tmp_path)
    if name != "preflight":  # which runs it first of all
        assert torch.equal(torch.random.get_rng_state(), state)


class Summed(nn.Module):
    """Gives a value of all samples together beside its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("anchors", torch.arange(6.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        return (y, self.anchors) if X is x else (y, self.anchors, y.square().mean())


def test_an_output_over_all_samples_is_refused_and_a_constant_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(SlimkitError, match="output 2 of Summed is computed over all samples"):
        slimkit.export(Summed(), X.clone(), "torch", directory=tmp_path / "a")

    class Constant(Summed):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().forward(x)[:2]

    assert slimkit.export(Constant(), X, "torch", directory=tmp_path / "b").agreement == 1


def test_a_model_that_keeps_something_between_runs_is_left_as_it_was() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("hidden", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.hidden += x.mean(0)
            return x + self.hidden

    model = Running()
    with pytest.raises(SlimkitError, match="or keeps something from one run for the next"):
        check_samples(model, (X,))
    assert torch.equal(model.hidden, torch.zeros(8))


def test_infinities_that_stay_are_no_noise() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x > 0, float("-inf"))

    check_samples(Masked(), (X,))
