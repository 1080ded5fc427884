"""Re-estimated statistics are the plain averages over the batches, computed in numpy."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from slimkit.batchnorm import reestimate_

BATCHES = list(torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.BatchNorm1d(2, affine=False))
    for norm in (net[0], net[2]):
        norm.running_mean.fill_(50.0)
        norm.running_var.fill_(9.0)
        norm.num_batches_tracked.fill_(1000)
    return net


def moments(batches):
    """Means over the batches of each batch's mean and unbiased variance, per channel."""
    stacked = [np.asarray(b, dtype=np.float64).transpose(1, 0, 2).reshape(2, -1) for b in batches]
    return np.mean([b.mean(1) for b in stacked], 0), np.mean([b.var(1, ddof=1) for b in stacked], 0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_statistics_are_the_averages_over_the_counted_batches(model, count):
    reestimate_(model, BATCHES, count)
    mean, variance = moments(BATCHES[:count])
    assert model[0].running_mean.numpy() == pytest.approx(mean, rel=1e-5)
    assert model[0].running_var.numpy() == pytest.approx(variance, rel=1e-5)


def test_later_norm_sees_no_dropout(model):
    reestimate_(model, BATCHES, 3)
    eps = model[0].eps
    normalized = [
        (b - b.mean((0, 2), keepdim=True))
        / (b.var((0, 2), correction=0, keepdim=True) + eps).sqrt()
        for b in BATCHES
    ]
    mean, variance = moments(normalized)
    assert model[2].running_mean.numpy() == pytest.approx(mean, abs=1e-6)
    assert model[2].running_var.numpy() == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize(("count", "used"), [(2, 2), (3, 3), (99, 3)])
def test_returns_how_many_batches_were_used(model, count, used):
    assert reestimate_(model, BATCHES, count) == used


def test_reads_no_more_batches_than_asked_for(model):
    batches = iter(BATCHES)
    reestimate_(model, batches, 2)
    assert torch.equal(next(batches), BATCHES[2])


def test_labels_beside_the_inputs_are_ignored(model):
    reestimate_(model, [(b, torch.zeros(4)) for b in BATCHES], 3)
    assert model[0].running_mean.numpy() == pytest.approx(moments(BATCHES)[0], rel=1e-5)


@pytest.mark.parametrize(("batches", "count"), [(BATCHES, 0), ([], 3)], ids=["count 0", "no data"])
def test_without_batches_everything_stays_as_it_is(model, batches, count):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert reestimate_(model, batches, count) == 0
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_norm_that_the_forward_does_not_reach_keeps_its_statistics(model):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = model[0], model[2]

        def forward(self, x):
            return self.used(x)

    reestimate_(Head(), BATCHES, 3)
    assert model[2].running_mean.tolist() == [50.0, 50.0]
    assert model[2].num_batches_tracked == 1000


def test_model_without_batch_norm_reads_no_data():
    assert reestimate_(nn.Linear(2, 2), itertools.repeat(None), 5) == 0


def test_momentum_and_training_flags_are_restored(model):
    model.train()
    model[2].eval().momentum = 0.3
    flags = [m.training for m in model.modules()]
    reestimate_(model, BATCHES, 3)
    assert [m.training for m in model.modules()] == flags
    assert (model[0].momentum, model[2].momentum) == (0.1, 0.3)


def test_momentum_and_statistics_are_restored_when_a_batch_fails(model):
    with pytest.raises(RuntimeError):
        reestimate_(model, [BATCHES[0], torch.zeros(4, 7, 5)], 3)
    assert model[0].momentum == 0.1
    assert model[0].running_mean.tolist() == [50.0, 50.0]


def test_weights_do_not_change_and_get_no_gradient(model):
    before = model[0].weight.clone()
    reestimate_(model, BATCHES, 3)
    assert torch.equal(before, model[0].weight)
    assert model[0].weight.grad is None
