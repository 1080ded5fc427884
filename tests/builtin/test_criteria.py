"""Each criterion on a layer of two by two weights, with the numbers written out."""

import inspect

import pytest
import torch

from slimkit.builtin.criteria.magnitude import L1, L2
from slimkit.builtin.criteria.random import Random
from slimkit.builtin.criteria.taylor import Taylor
from slimkit.interfaces import Layer
from slimkit.registry import discover

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


@pytest.mark.parametrize("name", [p.name for p in discover().plugins if p.kind == "criterion"])
class TestEveryCriterion:
    @pytest.fixture
    def layer(self):
        generator = torch.Generator().manual_seed(0)
        weight, gradient = torch.randn(2, 5, 3, 2, 2, generator=generator)
        return Layer("block.conv.weight", weight, gradient, torch.ones(5))

    def test_gives_scores_that_broadcast_to_the_weight(self, name, layer):
        score = discover().create("criterion", name).score(layer)
        assert torch.broadcast_shapes(score.shape, layer.weight.shape) == layer.weight.shape

    def test_gives_no_score_below_zero(self, name, layer):
        assert discover().create("criterion", name).score(layer).min() >= 0

    def test_gives_the_same_scores_again(self, name, layer):
        first = discover().create("criterion", name).score(layer)
        assert torch.equal(first, discover().create("criterion", name).score(layer))

    def test_does_not_change_the_layer(self, name, layer):
        before = layer.weight.clone(), layer.gradient.clone()
        discover().create("criterion", name).score(layer)
        assert torch.equal(before[0], layer.weight)
        assert torch.equal(before[1], layer.gradient)

    def test_has_typed_keyword_options_with_defaults(self, name):
        options = inspect.signature(type(discover().create("criterion", name))).parameters.values()
        assert all(
            o.kind is o.KEYWORD_ONLY and o.default is not o.empty and o.annotation is not o.empty
            for o in options
        )


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
