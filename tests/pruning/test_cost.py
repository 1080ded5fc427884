"""Costs against the formulas on paper, and predictions against what is measured after cutting."""

import copy
import math

import pytest
import torch
from models import PRUNABLE, Net, conv, make
from safetensors.torch import save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimkit.pruning.cost import CostModel, macs, parameters, size_mb
from slimkit.pruning.counting import Counting
from slimkit.pruning.prune import analyse
from slimkit.pruning.removal import kept_positions, remove_

# layer, shape of its input, MACs: output positions * weights (input positions where transposed)
ON_PAPER = {
    "linear": (nn.Linear(5, 3), (2, 5), 2 * 5 * 3),
    "linear on a sequence": (nn.Linear(5, 3), (2, 7, 5), 2 * 7 * 5 * 3),
    "conv1d": (nn.Conv1d(2, 3, 5), (1, 2, 9), 5 * 3 * 2 * 5),
    "conv2d": (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 5), 2 * 20 * 3 * 2 * 9),
    "conv2d with stride": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (1, 2, 4, 6), 6 * 3 * 2 * 9),
    "conv2d with groups": (nn.Conv2d(4, 6, 1, groups=2), (1, 4, 3, 3), 9 * 6 * 2),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 5, 5), 25 * 4 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 8 * 3 * 2 * 8),
    "transposed": (nn.ConvTranspose2d(2, 3, 4, stride=2), (1, 2, 5, 5), 25 * 2 * 3 * 16),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 4, stride=4), (1, 2, 5), 5 * 2 * 3 * 4),
    "no batch": (nn.Conv2d(2, 3, 1), (2, 4, 5), 20 * 2 * 3),
    "activation": (nn.ReLU(), (1, 5), 0),
}


@pytest.mark.parametrize("name", ON_PAPER)
def test_macs_are_those_on_paper(name):
    layer, shape, expected = ON_PAPER[name]
    assert macs(layer, (torch.zeros(shape),)) == expected


@pytest.mark.parametrize("name", ON_PAPER)
def test_predicted_macs_of_the_dense_layer_are_those_on_paper(name):
    layer, shape, expected = ON_PAPER[name]
    cost = CostModel.of(layer, (torch.zeros(shape),))
    assert (cost.predict({})[0], cost.fixed_macs) == (expected, 0)


def test_parameters_count_tied_weights_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert parameters(model) == 16 + 4 + 4


def halved(name, dtype=torch.float32):
    """The model, its inputs, the positions that every other channel keeps, and what goes."""
    model, inputs = make(name, dtype=dtype)
    groups = analyse(model, inputs).groups
    stay = {g.name: torch.arange(0, g.channels, 2) for g in groups}
    kept = kept_positions((g, stay[g.name]) for g in groups)
    return model, inputs, kept, Counting(groups).removed(stay)


@pytest.mark.parametrize("name", PRUNABLE)
def test_predicted_macs_of_a_cut_are_what_torch_counts_after_it(name):
    model, inputs, kept, gone = halved(name)
    predicted, _ = CostModel.of(model, inputs).predict(gone)
    remove_(model, kept)
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    assert predicted == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", PRUNABLE)
def test_predicted_parameters_of_a_cut_are_what_is_left(name):
    model, inputs, kept, gone = halved(name)
    _, predicted = CostModel.of(model, inputs).predict(gone)
    remove_(model, kept)
    assert predicted == sum(p.numel() for p in model.parameters())


def mib_in_safetensors(model):
    """What a file of the model's tensors has behind its header."""
    data = save(dict(model.state_dict()))
    return (len(data) - 8 - int.from_bytes(data[:8], "little")) / 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRUNABLE)
def test_size_before_and_predicted_after_a_cut_is_that_of_a_safetensors_file(name, dtype):
    model, inputs, kept, gone = halved(name, dtype)
    cost = CostModel.of(model, inputs)
    assert size_mb(model) == cost.predict_size_mb({}) == mib_in_safetensors(model)
    remove_(model, kept)
    assert size_mb(model) == cost.predict_size_mb(gone) == mib_in_safetensors(model)


def test_size_counts_saved_buffers_and_tied_tensors_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model.register_buffer("scratch", torch.zeros(1000), persistent=False)
    assert size_mb(model) == (4 * (16 + 4 + 4 + 4 * 4) + 8) / 2**20  # the int64 counts batches


def test_macs_of_no_weight_stay_whatever_is_cut():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 6, bias=False)

        def forward(self, x):
            return x @ x.transpose(1, 2) @ self.project(x)

    cost = CostModel.of(Attention(), (torch.zeros(1, 3, 4),))
    assert cost.predict({"project.weight": {0: 5}})[0] == 3 * 3 * 4 + 3 * 3 * 6 + 3 * 4


def test_weight_that_is_used_twice_costs_twice():
    model, inputs = make("shared")
    assert CostModel.of(model, inputs).macs_per_weight["twice.weight"] == 2 * 2 * 64


@pytest.mark.parametrize("count", [macs, CostModel.of])
def test_counting_leaves_the_model_as_it_was(count):
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    count(model, (torch.randn(2, 3, 8, 8),))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training


def test_a_parameter_that_is_handed_to_a_layer_is_no_obstacle():
    """PyTorch's counter raises on it where the parameter is trainable."""
    model = Net(lambda net, x: net.a(net.token.expand(len(x), -1)) + net.a(x), a=nn.Linear(4, 4))
    model.token = nn.Parameter(torch.zeros(1, 4))
    assert macs(model, (torch.zeros(2, 4),)) == 2 * 2 * 16
    assert CostModel.of(model, (torch.zeros(2, 4),)).measured_macs == 2 * 2 * 16
    assert model.token.requires_grad


class Products(nn.Module):
    """Weights that are multiplied without a layer, as GPT-2's are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 5))
        self.c, self.d = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 7))

    def forward(self, x):
        y = torch.addmm(self.c, (x @ self.a).view(-1, 6), self.b)
        return self.d @ y


def test_weights_of_plain_products_cost_their_rows():
    cost = CostModel.of(Products(), (torch.zeros(7, 4),))
    assert cost.macs_per_weight == {"a": 7, "b": 7, "d": 5}
    assert cost.measured_macs == 7 * 24 + 7 * 30 + 5 * 21
    assert cost.fixed_macs == 0
    assert cost.predict({"a": {1: 2}, "b": {0: 2}})[0] == 7 * 16 + 7 * 20 + 5 * 21


def test_attention_costs_what_it_is_made_of():
    """PyTorch's fast path computes it in one operation that its counter does not know."""
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.zeros(1, 5, 8)
    model = Net(lambda net, x: net.layer(x, x, x, need_weights=False)[0], layer=layer)
    counts = CostModel.of(model, (x,)).measured_macs, macs(model, (x,))
    assert counts[0] == counts[1] >= 5 * 4 * 64  # the projections at least


class Feed(nn.Module):
    """A linear layer whose weight is used in a way of its own, between two plain ones."""

    def __init__(self, use, *shape):
        super().__init__()
        self.use, self.w = use, nn.Parameter(torch.randn(*shape))
        self.before, self.behind = nn.Linear(4, 6), nn.Linear(5, 3)

    def forward(self, x):
        return self.behind(self.use(self.before(x), self.w))


def standardized(x, w):
    return nn.functional.linear(x, (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5))


FORMS = {
    "transposed": (lambda x, w: x @ w.t(), (5, 6)),
    "einsum": (lambda x, w: torch.einsum("oi,bti->bto", w, x), (5, 6)),
    "expanded": (lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), (6, 5)),
    "a slice": (lambda x, w: x @ w[0], (1, 6, 5)),
    "experts": (lambda x, w: torch.einsum("bti,eio->beto", x, w).mean(1), (2, 6, 5)),
    "scaled": (lambda x, w: nn.functional.linear(x, 0.5 * w), (5, 6)),
    "standardized": (standardized, (5, 6)),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_cost_what_they_are_used_however_they_are_written(form):
    use, shape = FORMS[form]
    model, x = Feed(use, *shape), torch.randn(2, 7, 4)
    cost = CostModel.of(model, (x,))
    assert cost.fixed_macs == 0
    assert cost.measured_macs == 14 * (24 + math.prod(shape) + 15)
    groups = analyse(model, (x,)).groups
    stay = {g.name: torch.arange(0, g.channels, 2) for g in groups}
    predicted = cost.predict(Counting(groups).removed(stay))[0]
    remove_(model, kept_positions((g, stay[g.name]) for g in groups))
    assert predicted == macs(model, (x,)) < cost.measured_macs
