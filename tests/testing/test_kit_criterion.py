"""Every promise of a criterion is broken by a plugin that breaks only this one."""

import pytest
import torch
from breaking import broken_by, subject_of

from slimkit.interfaces import Criterion
from slimkit.testing.criterion import CRITERION


class Right(Criterion):
    """Absolute weights."""

    def score(self, layer):
        return layer.weight.abs()


class Flat(Criterion):
    """One score an output channel, in a shape that only a linear layer's weight takes."""

    def score(self, layer):
        return layer.weight.abs().flatten(1).sum(1, keepdim=True)


class Wide(Criterion):
    """Scores of shape (out,), which broadcast along the wrong dimension or not at all."""

    def score(self, layer):
        return layer.weight.abs().flatten(1).sum(1)


class Negative(Criterion):
    """Signed weights."""

    def score(self, layer):
        return layer.weight.clone()


class Drawing(Criterion):
    """Adds noise from the global generator."""

    def score(self, layer):
        return layer.weight.abs() * (1 + 1e-6 * torch.rand(()))


class Writing(Criterion):
    """Computes in place."""

    def score(self, layer):
        return layer.weight.abs_().clone()


class WritingGamma(Criterion):
    """Computes in place, on another tensor than the weight."""

    needs = frozenset({"norm_scale"})

    def score(self, layer):
        layer.norm_scale.clamp_(min=0.01)
        return layer.weight.abs() * layer.norm_scale.reshape(-1, *[1] * (layer.weight.dim() - 1))


class Positional(Criterion):
    """Later output channels count more."""

    def score(self, layer):
        rank = torch.arange(1, len(layer.weight) + 1).to(layer.weight)
        return layer.weight.abs() * rank.reshape(-1, *[1] * (layer.weight.dim() - 1))


class PositionalInputs(Criterion):
    """Later inputs count more."""

    def score(self, layer):
        rank = torch.arange(1, layer.weight.shape[1] + 1).to(layer.weight)
        return layer.weight.abs() * rank.reshape(-1, *[1] * (layer.weight.dim() - 2))


class Demanding(Criterion):
    """Reads a gradient that it does not ask for."""

    def score(self, layer):
        return layer.weight.abs() + layer.gradient.abs()


class Misspelt(Criterion):
    """Asks for a field that no layer has."""

    needs = frozenset({"gradients"})

    def score(self, layer):
        return layer.weight.abs()


class Greedy(Criterion):
    """Asks for activations and does not look at them."""

    needs = frozenset({"activation"})

    def score(self, layer):
        return layer.weight.abs()


class Narrow(Criterion):
    """Squares twice in the tensor's own precision."""

    def score(self, layer):
        return layer.weight.square().square()


class Dividing(Criterion):
    """Divides by the layer's norm."""

    def score(self, layer):
        return layer.weight.abs() / layer.weight.abs().sum()


MUTANTS = {
    Flat: "scores_broadcast_to_the_weight",
    Negative: "scores_are_finite_and_not_negative",
    Drawing: "scores_are_the_same_again",
    Writing: "the_layer_is_not_changed",
    WritingGamma: "the_layer_is_not_changed",
    Positional: "scores_follow_a_channel_permutation",
    PositionalInputs: "scores_follow_a_channel_permutation",
    Demanding: "asks_only_for_what_it_needs",
    Misspelt: "asks_only_for_what_it_needs",
    Greedy: "uses_what_it_needs",
    Narrow: "half_precision",
    Dividing: "all_zero_weights",
}
# Scores of a wrong shape, or below zero, cannot be compared or are wrong for zeros as well.
MORE = {
    Flat: {"scores_follow_a_channel_permutation", "half_precision"},
}


def test_a_right_criterion_keeps_every_promise():
    assert broken_by(CRITERION, subject_of("criterion", Right)) == set()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_criterion_breaks_the_promise_that_it_should_and_no_other(mutant):
    broken = broken_by(CRITERION, subject_of("criterion", mutant))
    assert broken == {MUTANTS[mutant]} | MORE.get(mutant, set())


def test_every_promise_has_a_mutant():
    assert {promise.name for promise in CRITERION} == set(MUTANTS.values())


def test_scores_of_output_channels_in_one_dimension_are_caught():
    broken = broken_by(CRITERION, subject_of("criterion", Wide))
    assert "scores_broadcast_to_the_weight" in broken


def test_a_failure_says_what_was_promised_what_came_and_the_smallest_case():
    (promise,) = (p for p in CRITERION if p.name == "scores_are_finite_and_not_negative")
    told = str(promise.broken(subject_of("criterion", Negative)))
    assert told.splitlines()[0] == (
        "criterion 'mutant' of slimkit-mutant 1.0 breaks the promise "
        "scores_are_finite_and_not_negative"
    )
    assert "promised  Every score is a finite number of at least 0" in told
    assert "came      scores [" in told
    assert "case      linear layer, weight of shape (2, 2) in torch.float32" in told
    assert "weight = [" in told


def test_an_error_inside_a_plugin_is_told_with_its_own_line():
    (promise,) = (p for p in CRITERION if p.name == "scores_broadcast_to_the_weight")

    class Raising(Criterion):
        """Fails."""

        def score(self, layer):
            raise ZeroDivisionError("inside")

    told = str(promise.broken(subject_of("criterion", Raising)))
    assert "ZeroDivisionError: inside" in told
    assert 'raise ZeroDivisionError("inside")' in told
    assert "slimkit/testing" not in told
