"""Each criterion on a layer of two by two weights, with the numbers written out."""

import numpy as np
import pytest
import torch

from slimkit.builtin.criteria.activation import Activations
from slimkit.builtin.criteria.bn_scale import BatchNormScale
from slimkit.builtin.criteria.fpgm import FPGM
from slimkit.builtin.criteria.hessian import Hessian
from slimkit.builtin.criteria.lamp import LAMP
from slimkit.builtin.criteria.magnitude import L1, L2
from slimkit.builtin.criteria.random import Random
from slimkit.builtin.criteria.taylor import Taylor
from slimkit.builtin.criteria.wanda import Wanda
from slimkit.interfaces import Activation, Layer

WEIGHT = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
GRADIENT = torch.tensor([[2.0, 1.0], [-4.0, 0.0]])


@pytest.mark.parametrize(
    ("criterion", "scores"),
    [
        (L1(), [[1.0, 2.0], [0.5, 3.0]]),
        (L2(), [[1.0, 4.0], [0.25, 9.0]]),
        (Taylor(), [[4.0, 4.0], [4.0, 0.0]]),
    ],
    ids=["l1", "l2", "taylor"],
)
def test_scores_of_two_by_two_weights(criterion, scores):
    assert criterion.score(Layer("w", WEIGHT, GRADIENT)).tolist() == scores


def by_hand(criterion, **given):
    return criterion.score(Layer("w", WEIGHT, **given)).tolist()


def test_fpgm_is_the_sum_of_distances_to_the_other_filters():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    apart = 3 * 2**0.5  # of (3, 4) and (0, 1)
    scores = FPGM().score(Layer("w", weight))
    assert scores.flatten().tolist() == pytest.approx([6.0, 5 + apart, 1 + apart])
    assert scores.shape == (3, 1)


def test_fpgm_tells_near_filters_apart_from_equal_ones():
    weight = 1000 + torch.tensor([[0.0], [0.0], [1e-3]])
    scores = FPGM().score(Layer("w", weight)).flatten()
    assert scores[0] == scores[1] < scores[2]


def test_lamp_divides_by_what_is_at_least_as_large():
    # squares 1, 4, 0.25, 9; together 14.25
    expected = [[1 / 14, 4 / 13], [0.25 / 14.25, 1.0]]
    assert np.allclose(by_hand(LAMP()), expected, rtol=1e-12)


def test_lamp_of_a_layer_of_zeros_is_zero():
    assert LAMP().score(Layer("w", torch.zeros(2, 2))).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_hessian_is_half_the_fisher_information_times_the_squared_weight():
    fisher = torch.tensor([[2.0, 1.0], [4.0, 0.0]])
    assert by_hand(Hessian(), fisher=fisher) == [[1.0, 2.0], [0.5, 0.0]]


def test_bn_scale_is_the_variance_behind_batch_norm():
    assert by_hand(BatchNormScale(), norm_scale=torch.tensor([-0.5, 2.0])) == [[0.25], [4.0]]


def test_wanda_multiplies_columns_by_the_norm_of_their_input():
    norm = torch.tensor([[10.0, 1.0]])
    assert by_hand(Wanda(), input_norm=norm) == [[10.0, 2.0], [5.0, 3.0]]


@pytest.mark.parametrize(
    ("criterion", "scores"),
    [(Activations(), [[0.5], [2.0]]), (Activations(statistic="apoz"), [[0.75], [0.0]])],
)
def test_activation_takes_the_mean_or_the_fraction_above_zero(criterion, scores):
    seen = Activation(mean=torch.tensor([0.5, 2.0]), zeros=torch.tensor([0.25, 1.0]))
    assert by_hand(criterion, activation=seen) == scores


@pytest.mark.parametrize(
    ("criterion", "given"),
    [(Taylor(), "gradient"), (Hessian(), "fisher"), (L2(), "weight")],
    ids=["taylor", "hessian", "l2"],
)
def test_products_of_half_precision_tensors_do_not_become_zero(criterion, given):
    small = torch.full((2, 2), 1e-4, dtype=torch.float16)
    score = criterion.score(Layer("w", small, **({given: small} if given != "weight" else {})))
    assert score.min().item() > 0


def test_taylor_says_that_it_needs_gradients():
    assert Taylor.needs == {"gradient"}


@pytest.mark.parametrize("criterion", [L1, L2, Random])
def test_criteria_without_data_need_nothing(criterion):
    assert criterion.needs == frozenset()


def test_random_scores_differ_between_seeds():
    layer = Layer("w", torch.ones(8, 2))
    assert not torch.equal(Random(seed=0).score(layer), Random(seed=1).score(layer))


def test_random_scores_differ_between_layers():
    weight = torch.ones(8, 2)
    a, b = (Random().score(Layer(name, weight)) for name in ("a.weight", "b.weight"))
    assert not torch.equal(a, b)


def test_random_scores_do_not_look_at_the_weights():
    a, b = (Random().score(Layer("w", torch.full((8, 2), x))) for x in (0.0, 9.0))
    assert torch.equal(a, b)


def test_random_scores_leave_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Random().score(Layer("w", torch.ones(8, 2)))
    assert torch.equal(state, torch.get_rng_state())
