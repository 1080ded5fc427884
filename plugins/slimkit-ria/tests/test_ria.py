import numpy as np
import pytest
import torch
from slimkit_ria.criterion import RIA

import slimkit
from slimkit.interfaces import Layer

WEIGHT = torch.tensor([[1.0, -3.0], [0.5, 0.5]])


def test_score_is_both_shares_times_the_root_of_the_norm():
    score = RIA().score(Layer("w", WEIGHT, input_norm=torch.tensor([[4.0, 9.0]])))
    # rows sum to 4 and 1, columns to 1.5 and 3.5
    expected = [[(1 / 4 + 1 / 1.5) * 2, (3 / 4 + 3 / 3.5) * 3], [(0.5 + 0.5 / 1.5) * 2, 0]]
    expected[1][1] = (0.5 + 0.5 / 3.5) * 3
    assert np.allclose(score, expected, rtol=1e-6)


def test_a_layer_scaled_as_a_whole_scores_the_same():
    norm = torch.tensor([[4.0, 9.0]])
    small, large = (RIA().score(Layer("w", f * WEIGHT, input_norm=norm)) for f in (1e-4, 1e4))
    assert torch.allclose(small, large)


def test_a_convolution_is_that_of_its_matrix_of_filters():
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    score = RIA(power=0.0).score(Layer("w", weight, input_norm=torch.ones(1, 3, 1, 1)))
    flat = RIA(power=0.0).score(Layer("w", weight.flatten(1), input_norm=torch.ones(1, 12)))
    assert torch.allclose(score.flatten(1), flat)


@pytest.mark.parametrize("power", [-0.1, float("nan")])
def test_a_power_below_zero_is_refused(power):
    with pytest.raises(ValueError, match="at least 0"):
        RIA(power=power)


def test_a_network_is_pruned_by_it():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    small = slimkit.prune(net, x[:1], RIA(), target={"ratio": 0.5}, data=[x])
    assert small[0].out_features == 8
