"""Weights that PyTorch computes anew for each forward become plain, prunable and quantizable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import normal
from torch import Tensor, nn

import slimkit
from slimkit.errors import PruningError, QuantizationError

X = normal(2, 6, 40)
KINDS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm of old": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm of old": lambda layer: nn.utils.spectral_norm(layer),
}


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(
        KINDS[kind](nn.Conv1d(6, 16, 3)),
        nn.ReLU(),
        KINDS[kind](nn.Conv1d(16, 24, 3)),
        nn.ReLU(),
        nn.Flatten(),
        KINDS[kind](nn.Linear(24 * 36, 5)),
    )
    for _ in range(3):  # spectral_norm takes its steps in training
        made(X)
    return made


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_becomes_a_parameter_of_the_same_value(kind: str, tmp_path: Path) -> None:
    model = net(kind)
    with torch.no_grad():
        expected: Tensor = model.eval()(X)
        weight = model[2].weight.clone()
    model.train()
    plain = slimkit.rewrite(model, X, "plain-weights")
    assert [type(m) for m in plain] == [nn.Conv1d, nn.ReLU] * 2 + [nn.Flatten, nn.Linear]
    assert set(dict(plain.named_parameters())) >= {"0.weight", "2.weight", "5.weight"}
    assert sum(p.numel() for p in plain.parameters()) == 6 * 16 * 3 + 16 + 16 * 24 * 3 + 24 + (
        24 * 36 * 5 + 5
    )
    torch.testing.assert_close(plain[2].weight.detach(), weight)
    torch.testing.assert_close(plain.eval()(X).detach(), expected)
    small = slimkit.prune(plain, X, target={"flops": 0.5})
    assert small[0].out_channels < 16
    again = slimkit.load(slimkit.save(small, tmp_path / "small"), model=lambda: net(kind))
    torch.testing.assert_close(again(X), small(X), rtol=0, atol=0)
    artifact = slimkit.export(slimkit.quantize(small, [X]), X, directory=tmp_path / "int8")
    assert artifact.agreement == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_weight_stays_frozen_and_the_given_model_as_it_is(kind: str) -> None:
    model = net(kind)
    model[2].requires_grad_(False)
    names = set(model.state_dict())
    plain = slimkit.rewrite(model, X, "plain-weights")
    assert [p.requires_grad for p in plain[2].parameters()] == [False, False]
    assert plain[0].weight.requires_grad
    assert set(model.state_dict()) == names
    model(X)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_out_is_named(kind: str) -> None:
    with pytest.raises(PruningError, match=r"rewrite: \[plain-weights\]"):
        slimkit.prune(net(kind), X, target={"flops": 0.5})
    with pytest.raises(QuantizationError, match=r"rewrite: \[plain-weights\]") as error:
        slimkit.quantize(net(kind), [X])
    assert "calls none" not in str(error.value)
