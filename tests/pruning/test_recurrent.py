"""Recurrent layers lose hidden units in all gates, layers and directions at once."""

import pytest
import torch
from models import Net, lived_in, zeroed
from torch import nn

import slimkit
from slimkit.pruning.cost import CostModel, _counter, macs
from slimkit.pruning.counting import Counting
from slimkit.pruning.engines import find_groups
from slimkit.pruning.prune import analyse, prune
from slimkit.pruning.removal import kept_positions, remove_

SEQUENCE = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


def sequence(kind, **options):
    """A recurrent layer between two linear ones."""
    width = 8 * (2 if options.get("bidirectional") else 1)
    model = Net(
        lambda net, x: net.head(net.layer(net.stem(x))[0]),
        stem=nn.Linear(6, 10),
        layer=kind(10, 8, **{"batch_first": True, **options}),
        head=nn.Linear(width, 3),
    )
    return lived_in(model).eval()


def steps(kind):
    """The same, step by step; the state starts from nothing."""

    def flow(net, x):
        state, outs = None, []
        for step in net.stem(x).unbind(1):
            state = net.layer(step, state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        return net.head(torch.stack(outs, 1))

    layers = {"stem": nn.Linear(6, 10), "layer": kind(10, 8), "head": nn.Linear(8, 3)}
    return lived_in(Net(flow, **layers)).eval()


MODELS = {
    **{kind.__name__: lambda k=kind: sequence(k) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    "two layers": lambda: sequence(nn.LSTM, num_layers=2),
    "both directions": lambda: sequence(nn.GRU, bidirectional=True),
    "two layers, both directions": lambda: sequence(nn.LSTM, num_layers=2, bidirectional=True),
    "time first": lambda: sequence(nn.LSTM, batch_first=False),
    "without biases": lambda: sequence(nn.GRU, bias=False),
    **{kind.__name__: lambda k=kind: steps(k) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
}


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_hidden_units_go_and_the_rest_computes_the_same(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    small = prune(model, SEQUENCE, "random", target={"ratio": 0.5})
    assert (small.layer.input_size, small.layer.hidden_size) == (5, 4)
    expected = zeroed(model, small.slimkit_pruning.kept)(SEQUENCE)
    assert expected.std() > 0.01
    torch.testing.assert_close(small(SEQUENCE), expected, rtol=1e-4, atol=1e-6)
    small.train()(SEQUENCE).sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_those_of_every_step_and_are_predicted_of_a_cut(name):
    model = MODELS[name]()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    cost = CostModel.of(model, (SEQUENCE,))
    assert (cost.measured_macs, cost.fixed_macs) == (2 * 5 * matrices, 0)
    groups = analyse(model, (SEQUENCE,)).groups
    stay = {g.name: torch.arange(0, g.channels, 2) for g in groups}
    predicted = cost.predict(Counting(groups).removed(stay))[0]
    remove_(model, kept_positions((g, stay[g.name]) for g in groups))
    assert (
        predicted
        == macs(model, (SEQUENCE,))
        == 2 * 5 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    )


def test_steps_of_packed_sequences_are_those_that_are_there_and_a_learned_state_costs_nothing():
    def flow(net, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        ends = net.layer(packed)[0].data[-2:]
        return net.cell(ends, net.start), net.cell(x[:, 0], net.start)

    model = Net(flow, layer=nn.GRU(6, 6, batch_first=True), cell=nn.GRUCell(6, 6))
    model.start = nn.Parameter(torch.zeros(2, 6))
    uses = CostModel.of(model, (SEQUENCE,)).macs_per_weight
    assert uses == {
        "layer.weight_ih_l0": 8,
        "layer.weight_hh_l0": 8,
        "cell.weight_ih": 4,
        "cell.weight_hh": 4,
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_small_recurrent_model_is_loaded_by_its_function(name, tmp_path):
    torch.manual_seed(0)
    small = prune(MODELS[name](), SEQUENCE, target={"ratio": 0.5})
    again = slimkit.load(slimkit.save(small, tmp_path / "small"), model=MODELS[name])
    torch.testing.assert_close(again(SEQUENCE), small(SEQUENCE), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_every_gate_loses_the_same_units(kind):
    groups = {g.name: g for g in find_groups(sequence(kind), (SEQUENCE,)).groups}
    members = {(m.tensor, m.dim): m.channel.tolist() for m in groups["layer"].members}
    rows = [*range(8)] * GATES[kind]
    weights = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    assert {members[f"layer.{name}", 0] == rows for name in weights} == {True}
    assert members["layer.weight_hh_l0", 1] == members["head.weight", 1] == [*range(8)]


def test_a_state_that_is_an_input_stays_with_the_reason():
    def flow(net, x, h, c):
        h, c = net.cell(net.stem(x), (h, c))
        return net.head(h), h, c

    model = Net(flow, stem=nn.Linear(6, 10), cell=nn.LSTMCell(10, 8), head=nn.Linear(8, 3))
    inputs = (torch.randn(2, 6), torch.randn(2, 8), torch.randn(2, 8))
    coupling = analyse(model.eval(), inputs)
    assert [group.name for group in coupling.groups] == ["stem"]
    assert coupling.frozen["cell"] == "a state that is given"


def test_projections_stay_with_the_reason():
    model = Net(lambda net, x: net.layer(x)[0], layer=nn.LSTM(6, 8, proj_size=4))
    (reason,) = set(find_groups(model.eval(), (SEQUENCE,)).frozen.values())
    assert reason == "lstm: projections"


def test_a_layer_that_cudnn_computes_whole_counts_as_on_paper():
    """On PyTorch's device of shapes alone, since there may be no GPU."""
    layer, x = nn.LSTM(10, 8).to("meta"), torch.empty(5, 2, 10, device="meta")
    state = torch.empty(1, 2, 8, device="meta")
    weights = [p.detach() for p in layer.parameters()]
    with _counter() as counter:
        torch.ops.aten._cudnn_rnn(
            x, weights, 4, None, state, state, 2, 8, 0, 1, False, 0.0, False, False, [], None
        )
    assert counter.get_total_flops() == 2 * 5 * 2 * 4 * 8 * (10 + 8)


def test_the_function_takes_its_weights_in_a_tuple_too():
    def flow(net, x):
        own = (net.layer.weight_ih_l0, net.layer.weight_hh_l0)
        state = (x.new_zeros(1, 2, 8), x.new_zeros(1, 2, 8))
        return torch.lstm(x, state, own, False, 1, 0.0, False, False, True)[0]

    model = Net(flow, layer=nn.LSTM(6, 8, bias=False))
    assert CostModel.of(model, (SEQUENCE,)).fixed_macs == 0
