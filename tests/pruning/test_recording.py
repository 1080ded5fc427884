"""What is written down while a forward runs is what torch.export writes."""

import pytest
import torch
from models import PRUNABLE, Net, conv, lived_in, make
from random_nets import random_net
from torch import nn

from slimkit.errors import PruningError
from slimkit.pruning.engines import find_groups
from slimkit.pruning.exporting import exported
from slimkit.pruning.recording import LooksAtDataError, recorded

IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def described(coupling):
    """All that is known of each group."""
    return {
        group.name: (
            group.channels,
            group.doubtful,
            sorted((m.tensor, m.dim, m.role, m.norm, m.channel.tolist()) for m in group.members),
        )
        for group in coupling.groups
    }


def operations(written):
    return [str(n.target) for n in written.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", PRUNABLE)
def test_both_writers_write_the_same_operations(name):
    model, inputs = make(name)
    assert operations(recorded(model.eval(), inputs)) == operations(exported(model.eval(), inputs))


@pytest.mark.parametrize("name", PRUNABLE)
def test_both_writers_lead_to_the_same_groups(name):
    model, inputs = make(name)
    by_recording, by_export = (find_groups(model, inputs, e) for e in ("slimkit", "export"))
    assert described(by_recording) == described(by_export)
    assert by_recording.frozen == by_export.frozen


@pytest.mark.parametrize("seed", range(20))
def test_both_writers_lead_to_the_same_groups_of_any_network(seed):
    model = random_net(seed)
    by_recording, by_export = (find_groups(model, (IMAGE,), e) for e in ("slimkit", "export"))
    assert described(by_recording) == described(by_export)


def test_operations_know_the_module_that_calls_them():
    model = nn.Sequential(conv(3, 4), nn.Sequential(nn.ReLU()))
    for write in (recorded, exported):
        nodes = [n for n in write(model, (IMAGE,)).graph.nodes if n.op == "call_function"]
        assert [n.meta["module"] for n in nodes] == ["0", "1.0"]


def test_recording_leaves_the_numbers_and_no_hook_behind():
    model = lived_in(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True))).eval()
    before = model(IMAGE)
    recorded(model, (IMAGE,))
    assert torch.equal(model(IMAGE), before)
    assert model(IMAGE).requires_grad


def test_two_parameters_in_one_place_are_one():
    def flow(net, x):
        return net.b(torch.nn.functional.conv2d(x, net.a.weight.data, padding=1))

    (group,) = find_groups(Net(flow, a=conv(3, 4, bias=False), b=conv(4, 2)), (IMAGE,)).groups
    assert {(m.tensor, m.dim) for m in group.members} == {("a.weight", 0), ("b.weight", 1)}


@pytest.mark.parametrize(
    "look", [lambda s: s.item() > 0, lambda s: s > 0, lambda s: torch.equal(s, s)]
)
def test_a_forward_that_looks_at_its_data_is_not_recorded(look):
    model = Net(lambda net, x: net.a(x) if look(x.sum()) else net.a(-x), a=conv(3, 4))
    with pytest.raises(LooksAtDataError, match="takes a number out of a tensor"):
        recorded(model, (IMAGE,))


def test_a_forward_that_looks_at_its_parameters_is_recorded():
    model = Net(lambda net, x: net.a(x) if net.a.bias.sum() < 9 else x, a=conv(3, 4))
    assert "aten.conv2d.default" in operations(recorded(model, (IMAGE,)))


def test_the_error_names_the_module_that_looks():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.mean() > 0 else -x

    with pytest.raises(PruningError, match="the forward of 1 takes a number out of a tensor"):
        find_groups(nn.Sequential(conv(3, 4), Gate(), conv(4, 2)), (IMAGE,))


def test_a_forward_that_only_looks_outside_of_export_is_exported():
    def flow(net, x):
        if not torch.compiler.is_exporting() and x.isnan().any():
            raise ValueError("NaN")
        return net.b(net.a(x))

    (group,) = find_groups(Net(flow, a=conv(3, 4), b=conv(4, 2)), (IMAGE,)).groups
    assert group.name == "a"


def test_the_forwards_own_error_is_said_and_nothing_else(capfd):
    model = Net(lambda net, x: net.a(x) @ net.b, a=conv(3, 4))
    model.b = nn.Parameter(torch.zeros(7, 7))
    with pytest.raises(PruningError, match="cannot be traced for pruning: RuntimeError: .*7x7"):
        find_groups(model, (IMAGE,))


def test_multihead_attention_is_written_with_the_operations_that_it_is_made_of():
    before = torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    written = operations(recorded(layer, (torch.randn(1, 3, 8),)))
    assert "aten.scaled_dot_product_attention.default" in written
    assert torch.backends.mha.get_fastpath_enabled() is before is True
