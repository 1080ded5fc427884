"""A channel's importance is the sum over its weights in all coupled layers."""

import pytest
import torch
from models import Net, concatenation, conv, make, pooled, residual
from torch import nn

from slimkit.builtin.criteria.bn_scale import BatchNormScale
from slimkit.builtin.criteria.fpgm import FPGM
from slimkit.builtin.criteria.hessian import Hessian
from slimkit.builtin.criteria.magnitude import L1
from slimkit.builtin.criteria.taylor import Taylor
from slimkit.errors import PluginError, PruningError
from slimkit.interfaces import Criterion
from slimkit.pruning.engines import find_groups
from slimkit.pruning.prune import prune
from slimkit.pruning.scores import SAMPLES, fisher_of, group_scores, scores_over_batches

IMAGE = torch.zeros(1, 3, 8, 8)


class Seen(Criterion):
    """Keeps the layers that it is shown."""

    def __init__(self):
        self.layers = {}

    def score(self, layer):
        self.layers[layer.name] = layer
        return torch.ones_like(layer.weight)


class Constant(Criterion):
    """One given score per output channel."""

    def __init__(self, value):
        self.value = value

    def score(self, layer):
        return self.value


def two_layers():
    """Two hidden channels: 3 inputs, 2 channels, 2 outputs, with written-out weights."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -0.5]])
    model[1].weight.data = torch.tensor([[2.0, 1.0], [-2.0, 0.0]])
    return model, find_groups(model, (torch.zeros(1, 3),))


def test_score_sums_the_weights_that_make_and_that_read_a_channel():
    scores = group_scores(*two_layers(), L1())["0"]
    sums = torch.tensor([6.0 + 4.0, 1.0 + 1.0])
    assert scores.tolist() == pytest.approx((sums / sums.mean()).tolist())


def test_biases_do_not_count():
    model, coupling = two_layers()
    before = group_scores(model, coupling, L1())["0"]
    model[0].bias.data.fill_(100.0)
    assert torch.equal(before, group_scores(model, coupling, L1())["0"])


def test_scores_of_every_group_have_mean_one():
    model, inputs = make("residual")
    means = [
        s.mean().item() for s in group_scores(model, find_groups(model, inputs), L1()).values()
    ]
    assert means == pytest.approx([1.0] * 2)


def test_scores_that_are_all_zero_stay_zero():
    model, coupling = two_layers()
    scores = group_scores(model, coupling, Constant(torch.zeros(2, 1)))
    assert scores["0"].tolist() == [0.0, 0.0]


def test_flattened_channel_sums_over_all_its_pixels():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False))
    model[0].weight.data.zero_()
    model[2].weight.data = torch.arange(24.0).reshape(3, 8)
    coupling = find_groups(model, (torch.zeros(1, 1, 2, 2),))
    rows = [
        [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19],
        [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23],
    ]
    sums = torch.tensor([float(sum(row)) for row in rows])
    scores = group_scores(model, coupling, L1())["0"]
    assert scores.tolist() == pytest.approx((sums / sums.mean()).tolist())


def test_branch_of_a_concatenation_counts_only_its_own_columns():
    model = concatenation()
    with torch.no_grad():
        model.a.weight.zero_()
        model.head.weight.copy_(torch.arange(14.0).expand(4, 14))
    scores = group_scores(model, find_groups(model, (IMAGE,)), L1())["a"]
    assert scores.tolist() == pytest.approx([c / 3.5 for c in range(8)])


def test_layer_that_reads_only_some_channels_of_a_group_adds_to_those():
    def flow(net, x):
        return net.head(pooled(net.both(x) + torch.cat([net.a(x), net.b(x)], 1)))

    model = Net(flow, both=conv(3, 5), a=conv(3, 2), b=conv(3, 3), head=nn.Linear(5, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.a.weight[1] = 1.0  # 27 weights
        model.b.weight[0] = 1.0
    scores = group_scores(model, find_groups(model, (IMAGE,)), L1())["both"]
    assert (scores > 0).tolist() == [False, True, True, False, False]


def test_score_of_output_channels_counts_once_and_not_where_they_are_read():
    model, coupling = two_layers()
    scores = group_scores(model, coupling, Constant(torch.tensor([[1.0], [3.0]])))["0"]
    assert scores.tolist() == pytest.approx([0.5, 1.5])


def test_group_of_which_the_criterion_says_nothing_is_named():
    with pytest.raises(PruningError, match=r"BatchNormScale says nothing .* '0', .*norm_scale"):
        group_scores(*two_layers(), BatchNormScale())


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_is_shown_as_out_by_in(groups):
    """The layer that a plain convolution of the same channels would be."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=groups), nn.Conv2d(6, 2, 1)
    )
    coupling = find_groups(net, (torch.zeros(1, 3, 8, 8),))
    criterion = Seen()
    group_scores(net, coupling, criterion)
    shown, weight = criterion.layers["1.weight"].weight, net[1].weight.detach()
    assert shown.shape == (6, 4 // groups, 2, 2)
    for o in range(6):
        for i in range(4 // groups):
            group = o // (6 // groups)
            assert torch.equal(shown[o, i], weight[group * (4 // groups) + i, o % (6 // groups)])


def test_filters_of_a_transposed_convolution_are_its_outputs():
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 2, 1))
    coupling = find_groups(net, (torch.zeros(1, 3, 8, 8),))
    scores = group_scores(net, coupling, FPGM())["0"]
    filters = net[0].weight.detach().transpose(0, 1).flatten(1)
    distances = torch.stack([(filters - f).norm(dim=1).sum() for f in filters])
    assert scores.tolist() == pytest.approx((distances / distances.mean()).tolist())


def test_criterion_sees_the_scale_of_the_norm_right_behind_each_layer():
    model, criterion = residual(), Seen()
    for scale, norm in enumerate([model.bn0, model.bn1, model.bn2]):
        norm.weight.data.fill_(scale)
    group_scores(model, find_groups(model, (IMAGE,)), criterion)
    scales = {
        name: None if layer.norm_scale is None else layer.norm_scale.unique().tolist()
        for name, layer in criterion.layers.items()
    }
    assert scales == {
        "stem.weight": [0.0],
        "down.weight": [1.0],
        "up.weight": [2.0],
        "more.weight": None,
        "head.weight": None,
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_score_that_is_not_finite_is_an_error_that_names_the_group(value):
    with pytest.raises(PruningError, match="Constant gave a score that is not a finite.*'0'"):
        group_scores(*two_layers(), Constant(torch.full((2, 1), value)))


def test_criterion_that_needs_gradients_says_how_to_give_them():
    with pytest.raises(
        PruningError, match=r"Taylor needs gradients, but the loss gave any layer of '0' none"
    ):
        group_scores(*two_layers(), Taylor())


def loss(model, batch):
    return model(batch).square().sum()


BATCHES = [torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 3.0, 1.0]])]


def test_scores_over_batches_are_the_average_of_each_batchs_scores():
    model, coupling = two_layers()
    apart = [scores_over_batches(model, coupling, Taylor(), [b], loss, 1)["0"] for b in BATCHES]
    together = scores_over_batches(model, coupling, Taylor(), BATCHES, loss, 2)["0"]
    assert together.tolist() == pytest.approx(((apart[0] + apart[1]) / 2).tolist())


def test_scores_over_one_batch_are_those_of_its_gradient():
    model, coupling = two_layers()
    given = scores_over_batches(model, coupling, Taylor(), BATCHES, loss, 1)["0"]
    loss(model, BATCHES[0]).backward()
    assert torch.equal(given, group_scores(model, coupling, Taylor())["0"])


def test_no_more_batches_than_asked_for_are_read():
    batches = iter(BATCHES)
    scores_over_batches(*two_layers(), Taylor(), batches, loss, 1)
    assert torch.equal(next(batches), BATCHES[1])


def test_no_batch_at_all_is_an_error():
    with pytest.raises(PruningError, match="gave no batch"):
        scores_over_batches(*two_layers(), Taylor(), [], loss, 4)


def test_gradients_flags_and_frozen_layers_are_as_before():
    model, coupling = two_layers()
    model.train()
    model[0].requires_grad_(False)
    model[1].weight.grad = torch.full((2, 2), 7.0)
    scores_over_batches(model, coupling, Taylor(), BATCHES, loss, 2)
    assert model[1].weight.grad.unique().tolist() == [7.0]
    assert model[0].weight.grad is None
    assert (model.training, model[0].weight.requires_grad) == (True, False)


def test_frozen_layers_are_scored_like_others():
    model, coupling = two_layers()
    free = scores_over_batches(model, coupling, Taylor(), BATCHES, loss, 2)
    model.requires_grad_(False)
    assert torch.equal(
        free["0"], scores_over_batches(model, coupling, Taylor(), BATCHES, loss, 2)["0"]
    )


def test_batches_do_not_move_the_statistics_of_a_training_model():
    model, inputs = make("chain")
    before = model[1].running_mean.clone()
    coupling = find_groups(model, inputs)
    scores_over_batches(model.train(), coupling, Taylor(), [inputs[0]] * 2, loss, 2)
    assert torch.equal(before, model[1].running_mean)


def test_fisher_information_is_the_mean_of_each_samples_squared_gradient():
    model, _ = two_layers()
    batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = fisher_of(model, [batch, batch[:2]], loss, 2)
    squares = []
    for x in [*batch, *batch[:2]]:
        grads = torch.autograd.grad(loss(model, x[None]), list(model.parameters()))
        squares.append([g.square() for g in grads])
    for name, rows in zip(dict(model.named_parameters()), zip(*squares, strict=True), strict=True):
        torch.testing.assert_close(found[name], torch.stack(rows).mean(0))


def test_fisher_information_takes_no_more_samples_than_it_says():
    model, coupling = two_layers()
    seen = []

    def counting(net, batch):
        seen.append(len(batch))
        return loss(net, batch)

    scores_over_batches(model, coupling, Hessian(), [torch.ones(SAMPLES + 3, 3)], counting, 1)
    assert seen == [1] * SAMPLES


@pytest.mark.parametrize("given", [torch.ones(3, 7), torch.ones(1, 1, 1, 1, 9), 3, None])
def test_a_score_that_fits_no_weight_is_the_criterion_s(given):
    class Odd(Criterion):
        def score(self, layer):
            return given

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))
    with pytest.raises(PluginError, match="Odd gave .* for 0.weight, whose weight it sees as"):
        prune(net, torch.randn(1, 3, 8, 8), Odd(), target={"flops": 0.5})
