"""Each regularizer's gradient is that of its penalty, and only of channels that may go."""

import pytest
import torch
from models import make
from torch import nn

from slimkit.errors import PruningError
from slimkit.pruning.engines import find_groups
from slimkit.pruning.regularizers import REGULARIZERS, BNScale, GroupLasso, Growing


def network():
    """Linear, batch-norm, linear; channels 0 to 2 are made by the first and read by the second."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def groups_of(model, *inputs):
    return find_groups(model.eval(), inputs).groups


def penalised(regularizer, model):
    """The gradients of all parameters after the penalty was added to zeros."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    regularizer.add_(list(model.parameters()))
    return {name: p.grad for name, p in model.named_parameters()}


def by_autograd(penalty, model):
    model.zero_grad(set_to_none=True)
    penalty.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_bn_scale_is_the_sign_of_gamma_times_the_strength_and_nothing_else():
    model = network()
    model[1].weight.data = torch.tensor([0.5, -2.0, 0.0])
    found = penalised(BNScale(model, groups_of(model, torch.randn(2, 2)), 0.1), model)
    torch.testing.assert_close(found.pop("1.weight"), torch.tensor([0.1, -0.1, 0.0]))
    assert not any(gradient.any() for gradient in found.values())


def test_group_lasso_of_one_channel_by_hand():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[3.0], [0.0]])
    model[2].weight.data = torch.tensor([[4.0, 0.0]])  # the norm of channel 0 is 5, of 1 is 0
    found = penalised(GroupLasso(model, groups_of(model, torch.randn(1, 1)), 0.5), model)
    assert found["0.weight"].tolist() == [[pytest.approx(0.3)], [0.0]]
    assert found["2.weight"].tolist() == [[pytest.approx(0.4), 0.0]]
    assert not found["0.bias"].any()


@pytest.mark.parametrize("name", ["chain", "residual", "concatenation", "depthwise"])
def test_group_lasso_is_what_autograd_gives(name):
    model, inputs = make(name)
    groups = groups_of(model, *inputs)
    tensors = dict(model.named_parameters())
    norms = []
    for group in groups:
        for channel in range(group.channels):
            square = torch.zeros(())
            for member in group.members:
                tensor = tensors.get(member.tensor)
                if tensor is not None and tensor.dim() > 1:
                    for position in (member.channel == channel).nonzero().flatten():
                        square = square + tensor.select(member.dim, position).square().sum()
            norms.append(square.sqrt())
    expected = by_autograd(0.01 * sum(norms), model)
    assert_same(penalised(GroupLasso(model, groups, 0.01), model), expected)


def test_growing_is_the_gradient_of_the_chosen_channels_l2():
    model = network()
    growing = Growing(model, groups_of(model, torch.randn(2, 2)), 2.0)
    growing.chosen, growing.grown = {"0": torch.tensor([0, 2])}, 0.25
    weights = (model[0].weight[[0, 2]], model[3].weight[:, [0, 2]])
    penalty = 0.5 * 2.0 * 0.25 * sum(w.square().sum() for w in weights)
    expected = by_autograd(penalty, model)
    assert_same(penalised(growing, model), expected)


def test_growing_does_nothing_until_channels_are_chosen():
    model = network()
    growing = Growing(model, groups_of(model, torch.randn(2, 2)))
    assert not any(g.any() for g in penalised(growing, model).values())


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_channels_of_other_groups_are_left_alone(kind):
    model, inputs = make("chain")
    group = groups_of(model, *inputs)[0]
    regularizer = REGULARIZERS[kind](model, [group])
    if isinstance(regularizer, Growing):
        regularizer.chosen, regularizer.grown = {group.name: torch.arange(8)}, 1.0
    found = penalised(regularizer, model)
    touched = {name for name, gradient in found.items() if gradient.any()}
    assert touched == ({"1.weight"} if kind == "bn-scale" else {"0.weight", "3.weight"})


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_a_frozen_parameter_and_another_optimizers_are_left_alone(kind):
    model = network()
    regularizer = REGULARIZERS[kind](model, groups_of(model, torch.randn(2, 2)))
    if isinstance(regularizer, Growing):
        regularizer.chosen, regularizer.grown = {"0": torch.arange(3)}, 1.0
    for parameter in model[3].parameters():
        parameter.grad = torch.zeros_like(parameter)
    regularizer.add_(list(model[:3].parameters()))
    assert all(p.grad is None for p in model[:3].parameters())  # as frozen ones
    assert not any(p.grad.any() for p in model[3].parameters())  # as another optimizer's


def test_a_gradient_of_the_loss_is_kept():
    model = network()
    regularizer = BNScale(model, groups_of(model, torch.randn(2, 2)), 0.5)
    model[1].weight.grad = torch.tensor([1.0, 2.0, 3.0])
    regularizer.add_([model[1].weight])
    assert model[1].weight.grad.tolist() == [1.5, 2.5, 3.5]


def test_half_precision_norms_are_summed_in_float():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    groups = groups_of(model, torch.randn(1, 1))
    model.half()
    model[0].weight.data.fill_(300.0)  # its square is infinite in float16
    model[2].weight.data.fill_(400.0)
    found = penalised(GroupLasso(model, groups, 1.0), model)
    assert found["0.weight"][0].item() == pytest.approx(0.6, abs=1e-3)


def test_bn_scale_without_batch_norm_is_an_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(PruningError, match="no batch-norm behind channels .* choose group-lasso"):
        BNScale(model, groups_of(model, torch.randn(1, 2)))
