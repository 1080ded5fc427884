"""Approximate rewrites are the formulas of their papers, and what they cost is measured."""

import math

import pytest
import torch
from models import Net
from rewritten_nets import Gates, gates_by_hand, gelu_tanh, hardsigmoid, hardswish
from torch import nn
from torch.nn import functional

import slimkit

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 3


def test_every_way_to_write_silu_becomes_hardswish():
    fast = slimkit.rewrite(Gates(), X, "silu-to-hardswish")
    assert isinstance(fast.act, nn.Hardswish)
    assert fast.slimkit_rewriting.done[0].places == 4
    expected = gates_by_hand(X, hardswish, torch.sigmoid)
    torch.testing.assert_close(fast(X), expected)


def test_every_way_to_write_sigmoid_becomes_hardsigmoid():
    fast = slimkit.rewrite(Gates(), X, "sigmoid-to-hardsigmoid")
    assert fast.slimkit_rewriting.done[0].places == 3

    functions = iter([functional.silu, functional.silu, hardswish, hardswish])

    def silu(x):
        return next(functions)(x)  # x * sigmoid(x) is hard-swish then

    torch.testing.assert_close(fast(X), gates_by_hand(X, silu, hardsigmoid))


@pytest.mark.parametrize("functional_call", [False, True])
def test_gelu_becomes_its_form_with_tanh(functional_call):
    net = nn.Sequential(nn.GELU())
    if functional_call:
        net = Net(lambda net, x: functional.gelu(x))
    fast = slimkit.rewrite(net, X, "gelu-to-tanh")
    torch.testing.assert_close(fast(X), gelu_tanh(X))
    with pytest.raises(slimkit.SlimkitError, match="found nothing to do"):
        slimkit.rewrite(fast, X, "gelu-to-tanh")


def test_the_cost_is_the_ratio_of_signal_to_difference():
    net = nn.Sequential(nn.SiLU())
    data = [X, X + 1]
    done = slimkit.rewrite(net, X, "silu-to-hardswish", data=data).slimkit_rewriting.done[0]
    x = torch.cat(data).double()
    signal, noise = functional.silu(x), functional.silu(x) - hardswish(x)
    expected = 10 * math.log10(signal.square().sum() / noise.square().sum())
    assert done.sqnr_db == pytest.approx((expected,), abs=1e-3)
    assert done.samples == 8
    assert f"{expected:.1f} dB" in str(done)


def test_the_metric_is_taken_before_and_after():
    net = nn.Sequential(nn.SiLU(), nn.Sigmoid()).train()

    def evaluate(model):
        assert not model.training
        return model(torch.ones(1)).item()

    chosen = ["silu-to-hardswish", "sigmoid-to-hardsigmoid"]
    fast = slimkit.rewrite(net, X, chosen, evaluate=evaluate)
    first, second = fast.slimkit_rewriting.done
    one = torch.ones(1)
    middle = torch.sigmoid(hardswish(one)).item()
    assert first.metric == pytest.approx((torch.sigmoid(functional.silu(one)).item(), middle))
    assert second.metric == pytest.approx((middle, hardsigmoid(hardswish(one)).item()))
    assert fast.training


def test_only_the_named_places_are_rewritten():
    net = nn.Sequential(nn.Sequential(nn.SiLU(), nn.SiLU()), nn.SiLU())
    chosen = [{"name": "silu-to-hardswish", "options": {"at": ["0"]}}]
    fast = slimkit.rewrite(net, X, chosen)
    assert [type(m) for m in (*fast[0], fast[1])] == [nn.Hardswish, nn.Hardswish, nn.SiLU]
    wrong = [{"name": "silu-to-hardswish", "options": {"at": ["heads"]}}]
    with pytest.raises(slimkit.SlimkitError, match="no layer of the model is called 'heads'"):
        slimkit.rewrite(net, X, wrong)


def test_a_module_that_is_used_twice_is_swapped_in_both_places():
    act = nn.SiLU()
    net = nn.Sequential(act, nn.Linear(8, 8), act)
    fast = slimkit.rewrite(net, X, "silu-to-hardswish")
    assert fast[0] is fast[2]
    assert isinstance(fast[2], nn.Hardswish)
    assert net[0] is act
