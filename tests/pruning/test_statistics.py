"""What criteria are told of data, against hooks on the modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from slimkit.errors import PruningError
from slimkit.pruning.statistics import measure


class Net(nn.Module):
    """Two convolutions, of which the second has groups, and two uses of one linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        x = self.grouped(x).mean((2, 3))
        return self.linear(self.linear(x).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net()
    made.norm.running_mean.normal_()
    return made.train()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 6, 6, generator=generator) for n in (4, 2, 5)]


def test_norms_of_inputs_and_means_of_outputs(net, batches):
    found = measure(net, batches, 2)
    inputs, relu = [], []
    with torch.no_grad():
        net.eval()
        for x in batches[:2]:
            y = functional.relu(net.norm(net.first(x)))
            inputs.append(x)
            relu.append(y)
    x, y = torch.cat(inputs), torch.cat(relu)
    torch.testing.assert_close(
        found["first.weight"].input_norm(net.first.weight),
        x.square().sum((0, 2, 3)).sqrt().reshape(1, 3, 1, 1),
    )
    activation = found["first.weight"].activation
    torch.testing.assert_close(activation.mean, y.abs().mean((0, 2, 3)))
    torch.testing.assert_close(activation.zeros, (y == 0).float().mean((0, 2, 3)))


def test_each_group_of_a_convolution_reads_its_own_features(net, batches):
    found = measure(net, batches, 1)["grouped.weight"].input_norm(net.grouped.weight)
    with torch.no_grad():
        x = functional.relu(net.eval().norm(net.first(batches[0])))
    norm = x.square().sum((0, 2, 3)).sqrt()
    assert found.shape == (6, 2, 1, 1)
    torch.testing.assert_close(found[:3, :, 0, 0], norm[:2].expand(3, 2))
    torch.testing.assert_close(found[3:, :, 0, 0], norm[2:].expand(3, 2))


def test_a_weight_that_is_used_twice_counts_both_uses(net, batches):
    found = measure(net, batches, 1)["linear.weight"]
    with torch.no_grad():
        x = net.eval().grouped(functional.relu(net.norm(net.first(batches[0])))).mean((2, 3))
        y = net.linear(x).relu()
        z = net.linear(y)
    norm = torch.cat([x, y]).square().sum(0).sqrt()
    torch.testing.assert_close(found.input_norm(net.linear.weight), norm[None])
    torch.testing.assert_close(found.activation.mean, torch.cat([y, z]).abs().mean(0))


def test_the_model_is_as_it_was(net, batches):
    before = {name: t.clone() for name, t in net.state_dict().items()}
    measure(net, batches, 3)
    assert net.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_no_batch_is_an_error(net):
    with pytest.raises(PruningError, match="gave no batch"):
        measure(net, [], 3)
