"""Each operation ties the channels that it ties: which positions of which tensors are one."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import PRUNABLE, Net, conv, lived_in, make, pooled
from random_nets import random_net, zeroed_where_made
from torch import nn
from torch.nn import functional

from slimkit.errors import PruningError
from slimkit.pruning.engines import find_groups
from slimkit.pruning.prune import analyse, prune
from slimkit.pruning.selection import FIRST

IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
OUTPUT = "its channels are the model's output"


def found(model, *inputs):
    """Group name -> (tensor, dimension) -> the channel at each position."""
    coupling = find_groups(model.eval(), inputs)
    return {
        g.name: {(m.tensor, m.dim): m.channel.tolist() for m in g.members} for g in coupling.groups
    }


def frozen(model, *inputs):
    return find_groups(model.eval(), inputs).frozen


def proven(model, *inputs):
    """The names of the groups that also pass verification."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return [g.name for g in analyse(lived_in(model), inputs).groups]


def between(middle, before=8, after=None, **layers):
    """A convolution to `before` channels, `middle` (a function), and one from `after` channels."""

    def flow(net, x):
        return net.z(middle(net, net.a(x)))

    after = before if after is None else after
    model = Net(flow, a=conv(3, before, 1), **layers)
    model.z = conv(after, 2, 1)
    return model


A, Z = ("a.weight", 0), ("z.weight", 1)
EIGHT = [*range(8)]


def test_convolution_makes_in_dimension_0_and_reads_in_dimension_1():
    model = nn.Sequential(conv(3, 4), conv(4, 2))
    assert found(model, IMAGE) == {
        "0": {
            ("0.weight", 0): [0, 1, 2, 3],
            ("0.bias", 0): [0, 1, 2, 3],
            ("1.weight", 1): [0, 1, 2, 3],
        }
    }


def test_makers_are_out_and_readers_are_in():
    (group,) = find_groups(nn.Sequential(conv(3, 4), conv(4, 2)), (IMAGE,)).groups
    roles = {(m.tensor, m.dim): m.role for m in group.members}
    assert roles == {("0.weight", 0): "out", ("0.bias", 0): "out", ("1.weight", 1): "in"}


def test_depthwise_convolution_makes_what_it_reads():
    model = between(lambda net, x: net.d(x), d=conv(8, 8, groups=8))
    assert found(model, IMAGE) == {
        "a": dict.fromkeys([A, ("a.bias", 0), ("d.weight", 0), ("d.bias", 0), Z], EIGHT)
    }
    assert proven(model, IMAGE) == ["a"]


def test_depthwise_convolution_with_two_outputs_a_channel_makes_pairs():
    model = between(lambda net, x: net.d(x), 4, 8, d=conv(4, 8, groups=4))
    group = found(model, IMAGE)["a"]
    assert group[A] == [0, 1, 2, 3]
    assert group["d.weight", 0] == group["d.bias", 0] == group[Z] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert proven(model, IMAGE) == ["a"]


def test_grouped_convolution_loses_the_same_position_of_every_group():
    model = between(lambda net, x: net.g(x), 8, 6, g=conv(8, 6, groups=2))
    groups = found(model, IMAGE)
    assert groups["a"] == {
        A: [0, 1, 2, 3, 0, 1, 2, 3],
        ("a.bias", 0): [0, 1, 2, 3, 0, 1, 2, 3],
        ("g.weight", 1): [0, 1, 2, 3],
    }
    assert groups["g"] == {
        ("g.weight", 0): [0, 1, 2, 0, 1, 2],
        ("g.bias", 0): [0, 1, 2, 0, 1, 2],
        Z: [0, 1, 2, 0, 1, 2],
    }
    assert proven(model, IMAGE) == ["a", "g"]


def test_transposed_convolution_makes_in_dimension_1():
    model = between(lambda net, x: net.t(x), 8, 6, t=nn.ConvTranspose2d(8, 6, 2, stride=2))
    groups = found(model, IMAGE)
    assert groups["a"]["t.weight", 0] == EIGHT
    assert groups["t"] == dict.fromkeys([("t.weight", 1), ("t.bias", 0), Z], [*range(6)])


def test_grouped_transposed_convolution_loses_the_same_position_of_every_group():
    model = between(lambda net, x: net.t(x), 8, 6, t=nn.ConvTranspose2d(8, 6, 2, groups=2))
    groups = found(model, IMAGE)
    assert groups["a"][A] == groups["a"]["t.weight", 0] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert groups["t"] == {
        ("t.weight", 1): [0, 1, 2],
        ("t.bias", 0): [0, 1, 2, 0, 1, 2],
        Z: [0, 1, 2, 0, 1, 2],
    }
    assert proven(model, IMAGE) == ["a", "t"]


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_transposed_convolution_makes_what_it_reads(multiplier):
    layer = nn.ConvTranspose2d(8, 8 * multiplier, 2, groups=8)
    model = between(lambda net, x: net.t(x), 8, 8 * multiplier, t=layer)
    group = found(model, IMAGE)["a"]
    assert group["t.weight", 0] == EIGHT
    assert group[Z] == [c for c in EIGHT for _ in range(multiplier)]
    assert proven(model, IMAGE) == ["a"]


def test_linear_layer_on_rows_of_vectors():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    assert found(model, ROWS) == {
        "0": dict.fromkeys([("0.weight", 0), ("0.bias", 0), ("2.weight", 1)], [0, 1, 2, 3])
    }


def test_flattened_channel_lives_at_each_of_its_pixels():
    model = nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(64, 2))
    assert found(model, IMAGE)["0"]["2.weight", 1] == [c for c in range(4) for _ in range(16)]


def test_flattened_channels_that_come_last_alternate():
    model = nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 2))
    assert found(model, ROWS)["0"]["2.weight", 1] == [0, 1, 2, 3] * 5


def test_flattened_channels_are_found_again_when_unflattened():
    model = between(lambda net, x: x.flatten(1).unflatten(1, (8, 4, 4)))
    assert found(model, IMAGE)["a"][Z] == EIGHT


def test_residual_addition_makes_one_stream():
    model = between(lambda net, x: x + net.b(x), b=conv(8, 8))
    assert found(model, IMAGE) == {
        "a": dict.fromkeys(
            [A, ("a.bias", 0), ("b.weight", 0), ("b.bias", 0), ("b.weight", 1), Z], EIGHT
        )
    }


def test_concatenation_puts_two_groups_side_by_side():
    def flow(net, x):
        return net.z(torch.cat([net.a(x), net.b(x)], 1))

    model = Net(flow, a=conv(3, 4), b=conv(3, 2), z=conv(6, 2))
    groups = found(model, IMAGE)
    assert groups["a"][Z] == [0, 1, 2, 3, -1, -1]
    assert groups["b"][Z] == [-1, -1, -1, -1, 0, 1]


def test_concatenation_of_a_residual_stream_and_a_branch():
    def flow(net, x):
        x = net.a(x)
        return net.z(torch.cat([x + net.b(x), net.c(x)], 1))

    model = Net(flow, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2), z=conv(6, 2))
    groups = found(model, IMAGE)
    assert list(groups) == ["a", "c"]
    assert groups["a"]["b.weight", 0] == groups["a"]["c.weight", 1] == [0, 1, 2, 3]
    assert groups["a"][Z] == [0, 1, 2, 3, -1, -1]
    assert groups["c"][Z] == [-1, -1, -1, -1, 0, 1]


def test_concatenation_that_is_added_to_a_layer_joins_both_branches():
    def flow(net, x):
        return net.z(torch.cat([net.a(x), net.b(x)], 1) + net.c(x))

    model = Net(flow, a=conv(3, 1), b=conv(3, 4), c=conv(3, 5), z=conv(5, 2))
    group = found(model, IMAGE)["a"]
    at = group[Z]
    assert sorted(at) == [0, 1, 2, 3, 4]
    assert group["c.weight", 0] == at
    assert (group[A], group["b.weight", 0]) == (at[:1], at[1:])


@pytest.mark.parametrize("split", [lambda x: x.chunk(2, 1), lambda x: x.split(len(x[0]) // 2, 1)])
def test_equal_parts_lose_the_same_positions(split):
    def flow(net, x):
        left, right = split(net.a(x))
        return net.z(left * torch.sigmoid(right))

    model = Net(flow, a=conv(3, 8), z=conv(4, 2))
    group = found(model, IMAGE)["a"]
    assert (group[A], group[Z]) == ([0, 1, 2, 3] * 2, [0, 1, 2, 3])
    assert proven(model, IMAGE) == ["a"]


@pytest.mark.parametrize(
    ("move", "doubtful"),
    [
        (lambda x: sum(x.chunk(2, 1)), False),
        (lambda x: sum(x.split(4, 1)), True),
        (lambda x: x.flatten(1).view(len(x), 4, 4, -1).transpose(1, 3)[:, :4], True),
        (lambda x: x.mean(-1).view(len(x), -1, 1, 1)[:, :, :1], True),
        (lambda x: x.mean((2, 3), keepdim=True) + functional.relu(x), False),
    ],
)
def test_channels_behind_a_size_that_may_be_a_constant_are_doubtful(move, doubtful):
    width = move(torch.zeros(2, 8, 4, 4)).shape[1]
    model = between(lambda net, x: move(x), 8, width)
    coupling = find_groups(model.eval(), (IMAGE,))
    assert [group.doubtful for group in coupling.groups] == [doubtful] * len(coupling.groups)


def test_gated_linear_unit_loses_the_same_positions_of_both_halves():
    model = between(lambda net, x: functional.glu(x, 1), 8, 4)
    group = found(model, IMAGE)["a"]
    assert (group[A], group[Z]) == ([0, 1, 2, 3] * 2, [0, 1, 2, 3])
    assert proven(model, IMAGE) == ["a"]


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (lambda x: x.split([3, 5], 1)[1], "split_with_sizes into parts of different size"),
        (lambda x: x.chunk(3, 1)[0], "chunk into parts of different size"),
        (lambda x: x[:, 2:], "slice at a constant"),
        (lambda x: x[:, ::2], "slice at a constant"),
        (lambda x: x[:, 3:4], "slice at a constant"),
        (lambda x: x[:, 3].unsqueeze(1), "select at a constant"),
        (lambda x: x.unbind(1)[0].unsqueeze(1), "unbind"),
        (lambda x: x[:, [1, 2]], "positions are looked up in it"),
        (lambda x: x.roll(1, 1), "roll"),
        (lambda x: functional.pad(x, (0, 0, 0, 0, -1, 0)), "cropped by a constant"),
        (lambda x: x.cumsum(1), "the operation cumsum is not understood"),
        (lambda x: x.sort(1).values, "the operation sort is not understood"),
        (
            lambda x: functional.avg_pool1d(x.flatten(2).transpose(1, 2), 2)[:, :4, :, None],
            "avg_poo",
        ),
        (lambda x: functional.layer_norm(x, x.shape[1:]), "layer-norm over several dimensions"),
        (lambda x: x + torch.arange(8.0)[:, None, None], "add with a constant"),
        (lambda x: x + torch.zeros_like(x)[:, :1].expand(2, 8, 4, 4), "slice at a constant"),
    ],
)
def test_positions_that_are_fixed_by_the_code_are_frozen_with_the_reason(cut, reason):
    width = cut(torch.zeros(2, 8, 4, 4)).shape[1]
    assert frozen(between(lambda net, x: cut(x), 8, width), IMAGE)["a"].startswith(reason)


def test_channels_that_a_view_mixes_with_pixels_stay():
    model = between(lambda net, x: x.transpose(1, 3).reshape(2, 6, 4, 4), 6)
    assert frozen(model, IMAGE)["a"] == "reshape mixes channels with other dimensions"


def test_flipped_channels_are_read_backwards():
    model = between(lambda net, x: x.flip(1))
    assert found(model, IMAGE)["a"][Z] == EIGHT[::-1]
    assert proven(model, IMAGE) == ["a"]


@pytest.mark.parametrize("times", [lambda x: x.repeat(1, 2, 1, 1), lambda x: torch.cat([x, x], 1)])
def test_repeated_channels_are_read_at_each_place(times):
    model = between(lambda net, x: times(x), 4, 8)
    assert found(model, IMAGE)["a"][Z] == [0, 1, 2, 3] * 2
    assert proven(model, IMAGE) == ["a"]


def test_channels_that_are_repeated_one_by_one_are_read_side_by_side():
    model = between(lambda net, x: x.repeat_interleave(2, 1), 4, 8)
    assert found(model, IMAGE)["a"][Z] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert proven(model, IMAGE) == ["a"]


def test_shortcut_padded_with_zero_channels_fixes_those_that_meet_the_padding():
    def flow(net, x):
        x = net.a(x)
        return net.z(net.b(x) + functional.pad(x, (0, 0, 0, 0, 1, 1)))

    model = Net(flow, a=conv(3, 4), b=conv(4, 6), z=conv(6, 2))
    group = found(model, IMAGE)["a"]
    assert group[A] == group["b.weight", 1] == [0, 1, 2, 3]
    assert group["b.weight", 0] == group["b.bias", 0] == group[Z] == [-1, 0, 1, 2, 3, -1]
    assert proven(model, IMAGE) == ["a"]


def test_padding_of_pixels_leaves_channels_alone():
    model = between(lambda net, x: functional.pad(x, (1, 1, 1, 1), mode="reflect"))
    assert found(model, IMAGE)["a"][Z] == EIGHT


def test_shuffled_channels_lose_the_same_position_of_every_part():
    def shuffle(net, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    model = between(shuffle)
    group = found(model, IMAGE)["a"]
    assert group[A] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert group[Z] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert proven(model, IMAGE) == ["a"]


@pytest.mark.parametrize(
    "split",
    [
        lambda x: x.unflatten(1, (-1, 2)),
        lambda x: x.reshape(len(x), -1, 2, *x.shape[2:]),
        lambda x: x.reshape(len(x), x.shape[1] // 2, 2, *x.shape[2:]),
    ],
)
def test_shuffled_pairs_go_whole(split):
    model = between(lambda net, x: split(x).transpose(1, 2).flatten(1, 2))
    group = found(model, IMAGE)["a"]
    assert (group[A], group[Z]) == ([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 0, 1, 2, 3])
    assert proven(model, IMAGE) == ["a"]


def test_channel_shuffle_module_is_the_same_shuffle():
    group = found(between(lambda net, x: net.s(x), s=nn.ChannelShuffle(2)), IMAGE)["a"]
    assert (group[A], group[Z]) == ([0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("batch", [1, 2])
def test_parts_moved_into_the_batch_lose_the_same_positions(batch):
    def flow(net, x):
        n, c, h, w = x.shape
        return x.reshape(n * 2, c // 2, h, w).reshape(n, c, h, w)

    group = found(between(flow), IMAGE[:batch])["a"]
    assert group[A] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_pixel_shuffle_takes_its_subpixels_together():
    model = between(lambda net, x: functional.pixel_shuffle(x, 2), 8, 2)
    group = found(model, IMAGE)["a"]
    assert (group[A], group[Z]) == ([0, 0, 0, 0, 1, 1, 1, 1], [0, 1])
    assert proven(model, IMAGE) == ["a"]


def test_pixel_unshuffle_makes_a_channel_of_each_subpixel():
    model = between(lambda net, x: functional.pixel_unshuffle(x, 2), 2, 8)
    group = found(model, IMAGE)["a"]
    assert (group[A], group[Z]) == ([0, 1], [0, 0, 0, 0, 1, 1, 1, 1])
    assert proven(model, IMAGE) == ["a"]


def test_squeeze_and_excite_gate_belongs_to_the_channels_that_it_scales():
    def gate(net, x):
        return x * torch.sigmoid(net.up(functional.relu(net.down(pooled(x)))))[:, :, None, None]

    model = between(gate, down=nn.Linear(8, 4), up=nn.Linear(4, 8))
    groups = found(model, IMAGE)
    assert groups["a"] == dict.fromkeys(
        [A, ("a.bias", 0), ("down.weight", 1), ("up.weight", 0), ("up.bias", 0), Z], EIGHT
    )
    assert list(groups) == ["a", "down"]
    assert proven(model, IMAGE) == ["a", "down"]


def test_gate_of_a_single_channel_stays():
    def flow(net, x):
        gates = torch.cat([net.g(x), net.h(x)], 1) + net.i(x)
        return net.z(net.a(x) * gates) + net.y(net.g(x) * net.a(x))

    model = Net(flow, a=conv(3, 4), g=conv(3, 1), h=conv(3, 3), i=conv(3, 4), z=conv(4, 2))
    model.y = conv(4, 2)
    group = found(model, IMAGE)["a"]
    assert "g.weight" not in {tensor for tensor, _ in group}
    assert group["i.weight", 0] == [-1, 0, 1, 2]


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False)], ids=str
)
def test_normalization_over_channels_scales_them(norm):
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 2))
    group = found(model, ROWS)["0"]
    assert group["1.weight", 0] == group["2.weight", 1] == [*range(6)]
    assert proven(model, ROWS) == ["0"]


def test_group_norm_loses_the_same_position_of_every_group():
    model = between(lambda net, x: net.n(x), n=nn.GroupNorm(2, 8))
    group = found(model, IMAGE)["a"]
    assert group[A] == group["n.weight", 0] == group["n.bias", 0] == group[Z] == [0, 1, 2, 3] * 2
    assert proven(model, IMAGE) == ["a"]


def test_group_norm_of_one_group_ties_nothing():
    assert found(between(lambda net, x: net.n(x), n=nn.GroupNorm(1, 8)), IMAGE)["a"][A] == EIGHT


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True)], ids=str)
def test_norm_of_each_channel_goes_along(norm):
    model = between(lambda net, x: net.n(x), n=norm)
    assert found(model, IMAGE)["a"]["n.weight", 0] == EIGHT
    assert proven(model, IMAGE) == ["a"]


def test_prelu_with_a_slope_a_channel_goes_along():
    model = between(lambda net, x: net.p(x), p=nn.PReLU(8))
    assert found(model, IMAGE)["a"]["p.weight", 0] == EIGHT


def test_single_prelu_slope_is_left_alone():
    model = between(lambda net, x: net.p(x), p=nn.PReLU())
    assert ("p.weight", 0) not in found(model, IMAGE)["a"]


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1)])
def test_layer_scale_goes_along(shape):
    model = between(lambda net, x: x * net.scale)
    model.scale = nn.Parameter(torch.rand(shape))
    assert found(model, IMAGE)["a"]["scale", shape.index(8)] == EIGHT
    assert proven(model, IMAGE) == ["a"]


def test_buffer_that_scales_channels_goes_along():
    model = between(lambda net, x: x * net.scale)
    model.register_buffer("scale", torch.rand(1, 8, 1, 1))
    assert found(model, IMAGE)["a"]["scale", 1] == EIGHT
    assert proven(model, IMAGE) == ["a"]


def attention(product):
    """Two heads over 5 tokens; `product` takes queries, keys and values."""

    def flow(net, x):
        n, t, _ = x.shape
        heads = [f(x).reshape(n, t, 2, -1).transpose(1, 2) for f in (net.q, net.k, net.v)]
        return net.o(product(*heads).transpose(1, 2).reshape(n, t, -1))

    return Net(flow, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), o=nn.Linear(8, 3))


def test_attention_cuts_queries_with_keys_and_all_heads_alike():
    model = attention(functional.scaled_dot_product_attention)
    both = [0, 1, 2, 3] * 2
    assert found(model, ROWS) == {
        "q": dict.fromkeys([("q.weight", 0), ("q.bias", 0), ("k.weight", 0), ("k.bias", 0)], both),
        "v": dict.fromkeys([("v.weight", 0), ("v.bias", 0), ("o.weight", 1)], both),
    }
    assert frozen(model, ROWS) == {"o": OUTPUT}
    assert proven(model, ROWS) == ["q", "v"]


def test_attention_scaled_by_the_size_of_a_head_scales_its_queries_only():
    (queries, values) = find_groups(
        attention(functional.scaled_dot_product_attention), (ROWS,)
    ).groups
    assert {part.tensor for part in queries.rescaled} == {"q.weight", "q.bias"}
    assert values.rescaled == ()


def test_attention_by_hand_cuts_queries_with_keys():
    def product(q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v

    model = attention(product)
    groups = found(model, ROWS)
    assert list(groups) == ["q", "v"]
    assert groups["q"] == dict.fromkeys(
        [("q.weight", 0), ("q.bias", 0), ("k.weight", 0), ("k.bias", 0)], [0, 1, 2, 3] * 2
    )
    assert groups["v"]["o.weight", 1] == [0, 1, 2, 3] * 2
    assert proven(model, ROWS) == ["q", "v"]


def test_queries_keys_and_values_of_one_layer_go_together():
    def flow(net, x):
        n, t, _ = x.shape
        q, k, v = net.qkv(x).reshape(n, t, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = functional.scaled_dot_product_attention(q, k, v)
        return net.o(out.transpose(1, 2).reshape(n, t, -1))

    model = Net(flow, qkv=nn.Linear(6, 24), o=nn.Linear(8, 3))
    assert found(model, ROWS) == {
        "qkv": {
            ("qkv.weight", 0): [0, 1, 2, 3] * 6,
            ("qkv.bias", 0): [0, 1, 2, 3] * 6,
            ("o.weight", 1): [0, 1, 2, 3] * 2,
        }
    }
    assert proven(model, ROWS) == ["qkv"]


def test_embedding_and_positions_belong_to_the_stream():
    def flow(net, tokens):
        x = net.table(tokens) + net.positions
        return net.head(x + net.mix(net.norm(x)))

    model = Net(flow, table=nn.Embedding(10, 6), norm=nn.LayerNorm(6), mix=nn.Linear(6, 6))
    model.head = nn.Linear(6, 2)
    model.positions = nn.Parameter(torch.randn(1, 4, 6))
    tokens = torch.tensor([[1, 2, 3, 4]])
    (group,) = found(model, tokens).values()
    assert group == dict.fromkeys(
        [
            ("positions", 2),
            ("table.weight", 1),
            ("norm.weight", 0),
            ("norm.bias", 0),
            ("mix.weight", 0),
            ("mix.weight", 1),
            ("mix.bias", 0),
            ("head.weight", 1),
        ],
        [*range(6)],
    )
    assert proven(model, tokens) == ["table"]


def test_class_token_that_is_expanded_and_joined_belongs_to_the_stream():
    def flow(net, x):
        x = torch.cat([net.token.expand(len(x), -1, -1), net.a(x)], 1)
        return net.z(x[:, 0])

    model = Net(flow, a=nn.Linear(6, 4), z=nn.Linear(4, 2))
    model.token = nn.Parameter(torch.randn(1, 1, 4))
    assert found(model, ROWS)["a"]["token", 2] == [0, 1, 2, 3]
    assert proven(model, ROWS) == ["a"]


def test_expanded_channels_beside_others_stay():
    def flow(net, x):
        wide = net.one(x).expand(-1, 3, -1, -1)
        return net.z(torch.cat([wide, net.a(x)], 1) + net.b(x))

    model = Net(flow, one=conv(3, 1), a=conv(3, 2), b=conv(3, 5), z=conv(5, 2))
    assert found(model, IMAGE)["a"]["b.weight", 0] == [-1, -1, -1, 0, 1]
    assert proven(model, IMAGE) == ["a"]


def test_expanded_tensor_that_is_flattened_ties_nothing():
    def flow(net, x):
        wide = pooled(net.a(x))[:, :, None].expand(-1, -1, 3)
        return net.z(wide.flatten(1))

    model = Net(flow, a=conv(3, 4), z=nn.Linear(12, 2))
    assert found(model, IMAGE)["a"][Z] == [c for c in range(4) for _ in range(3)]
    assert proven(model, IMAGE) == ["a"]


def test_tied_weights_are_cut_under_both_names():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    model.append(nn.Linear(6, 2))  # the first two read the input, so a layer goes before
    (group,) = found(nn.Sequential(nn.Linear(6, 6), *model), ROWS).values()
    assert group["1.weight", 0] == group["2.weight", 0] == [*range(6)]
    assert group["1.weight", 1] == group["2.weight", 1] == [*range(6)]


def test_module_that_is_called_again_joins_its_inputs_and_outputs():
    model = between(lambda net, x: net.b(net.b(x)), b=conv(8, 8))
    group = found(model, IMAGE)["a"]
    assert group["b.weight", 0] == group["b.weight", 1] == EIGHT


def test_several_inputs_meet():
    def flow(net, x, y):
        return net.z(net.a(x) + net.b(y))

    model = Net(flow, a=nn.Linear(6, 4), b=nn.Linear(3, 4), z=nn.Linear(4, 2))
    group = found(model, ROWS, torch.zeros(2, 5, 3))["a"]
    assert group["b.weight", 0] == group[Z] == [0, 1, 2, 3]


def test_dictionary_of_inputs_and_nested_outputs():
    def flow(net, batch):
        x = net.a(batch["x"])
        return {"z": net.z(x), "more": (net.b(batch["y"]), [x.mean()])}

    model = Net(flow, a=nn.Linear(6, 4), b=nn.Linear(3, 4), z=nn.Linear(4, 2))
    batch = {"x": ROWS, "y": torch.zeros(2, 3)}
    assert list(found(model, batch)) == ["a"]
    assert frozen(model, batch) == {"b": OUTPUT, "z": OUTPUT}


@pytest.mark.parametrize("output", [lambda x: x, lambda x: (x, x.sum()), lambda x: {"x": [x]}])
def test_channels_that_reach_the_output_stay(output):
    assert frozen(Net(lambda net, x: output(net.a(x)), a=conv(3, 4)), IMAGE) == {"a": OUTPUT}


def test_contraction_by_letters_ties_equal_letters():
    def flow(net, x):
        return torch.einsum("btc,co->bto", net.a(x), net.w)

    model = Net(flow, a=nn.Linear(6, 4))
    model.w = nn.Parameter(torch.randn(4, 2))
    assert found(model, ROWS)["a"]["w", 0] == [0, 1, 2, 3]
    assert frozen(model, ROWS) == {"w": OUTPUT}
    assert proven(model, ROWS) == ["a"]


def test_matrix_parameters_make_and_read_channels():
    def flow(net, x):
        return torch.relu(x @ net.first) @ net.second

    model = Net(flow)
    model.first, model.second = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 2))
    assert found(model, ROWS) == {
        "first": {("first", 1): [0, 1, 2, 3], ("second", 0): [0, 1, 2, 3]}
    }
    assert proven(model, ROWS) == ["first"]


def test_two_weights_of_one_layer_make_two_groups_with_names_of_their_own():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (
                nn.Parameter(torch.randn(4, 6)),
                nn.Parameter(torch.randn(5, 4)),
            )

        def forward(self, x):
            return functional.linear(functional.linear(x, self.first).relu(), self.second).relu()

    model = nn.Sequential(Pair(), nn.Linear(5, 2))
    assert list(found(model, ROWS)) == ["0", "0.second"]
    assert proven(model, ROWS) == ["0", "0.second"]


def test_operation_that_is_not_understood_freezes_what_feeds_it():
    def flow(net, x):
        return net.z(torch.fft.fft(net.a(x)).real)

    model = Net(flow, a=nn.Linear(6, 4), z=nn.Linear(4, 2))
    assert frozen(model, ROWS) == {"a": "the operation fft_fft is not understood", "z": OUTPUT}


def test_bare_parameter_as_a_kernel_is_cut():
    model = between(lambda net, x: functional.conv2d(x, net.kernel), 8, 6)
    model.kernel = nn.Parameter(torch.randn(6, 8, 1, 1))
    groups = found(model, IMAGE)
    assert groups["a"]["kernel", 1] == EIGHT
    assert groups["kernel"] == {("kernel", 0): [*range(6)], Z: [*range(6)]}
    assert proven(model, IMAGE) == ["kernel", "a"]


def standardized(weight):
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)


def batch_normed(weight):
    """As timm standardizes weights."""
    flat = weight.reshape(1, weight.shape[0], -1)
    return functional.batch_norm(flat, None, None, training=True).reshape_as(weight)


@pytest.mark.parametrize("compute", [torch.tanh, lambda w: w * 0.5, lambda w: 0.5 * w + w.sign()])
def test_computed_weight_makes_and_reads_as_the_parameter_behind_it(compute):
    model = between(
        lambda net, x: functional.conv2d(x, compute(net.b.weight)), 8, 6, b=conv(8, 6, 3)
    )
    model.b.bias = None
    groups = found(model, IMAGE)
    assert groups["a"]["b.weight", 1] == EIGHT
    assert groups["b"] == {("b.weight", 0): [*range(6)], Z: [*range(6)]}
    assert proven(model, IMAGE) == ["a", "b"]


def test_weight_that_batch_norm_standardizes_is_cut_in_its_outputs():
    model = between(
        lambda net, x: functional.conv2d(x, batch_normed(net.b.weight)), 8, 6, b=conv(8, 6)
    )
    model.b.bias = None
    groups = found(model, IMAGE)
    assert groups["b"] == {("b.weight", 0): [*range(6)], Z: [*range(6)]}
    assert groups["a"]["b.weight", 1] == EIGHT  # verification refuses: the mean is over them
    assert "b" in proven(model, IMAGE)


def test_weight_that_is_flattened_for_good_keeps_its_inputs():
    def flow(net, x):
        return net.z(torch.relu(functional.linear(net.a(x).flatten(1), net.kernel.flatten(1))))

    model = Net(flow, a=conv(3, 8), z=nn.Linear(6, 2))
    model.kernel = nn.Parameter(torch.randn(6, 8, 4, 4))
    assert frozen(model, IMAGE)["a"] == "flatten merges several dimensions of channels"
    assert found(model, IMAGE) == {"kernel": {("kernel", 0): [*range(6)], Z: [*range(6)]}}


def test_weight_of_a_parametrization_that_is_not_followed_is_listed():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    model = nn.Sequential(normed, nn.Linear(4, 2))
    (reason,) = {v for k, v in frozen(model, ROWS).items() if k.startswith("0.param")}
    assert reason.startswith(
        "the operation _weight_norm is not understood (rewrite: [plain-weights]"
    )


def test_layer_with_a_single_channel_is_listed():
    model = nn.Sequential(conv(3, 1), conv(1, 2))
    assert frozen(model, IMAGE)["0"] == "it has a single channel"


@pytest.mark.parametrize(
    ("shrink", "width"),
    [
        (lambda x: x.mean((2, 3), keepdim=True), 8),
        (lambda x: x.sum(dim=-1, keepdim=True), 8),
        (lambda x: x.amax(dim=(2, 3))[..., None, None], 8),
        (lambda x: x.max(2, keepdim=True)[0], 8),
        (lambda x: torch.max(x, x * 2), 8),
        (lambda x: torch.minimum(x, x * 2), 8),
        (lambda x: x.var((2, 3), keepdim=True), 8),
        (lambda x: x.std(3, unbiased=False, keepdim=True), 8),
        (lambda x: torch.var_mean(x, (2, 3), keepdim=True)[1], 8),
        (lambda x: x.norm(dim=2, keepdim=True), 8),
        (lambda x: x.norm(3, -1, True), 8),
        (lambda x: torch.linalg.norm(x, dim=3, keepdim=True), 8),
        (lambda x: torch.linalg.vector_norm(x, 1, (2, 3), keepdim=True), 8),
        (lambda x: torch.logsumexp(x, (2, 3), keepdim=True), 8),
        (lambda x: x.prod(2, keepdim=True), 8),
        (lambda x: x.mean(2).mean(-1)[:, :, None, None], 8),
        (lambda x: x - x.mean(), 8),
        (lambda x: x / x.var(), 8),
        (lambda x: x / (1 + x.norm(p=2)), 8),
        (lambda x: x / (1 + x.norm(dim=1, keepdim=True)), 8),
        (lambda x: x.mean(3).unsqueeze(-1), 8),
        (lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)[:, :, None, None], 8),
        (lambda x: x.permute(0, 2, 3, 1).mean(1).permute(0, 2, 1)[..., None], 8),
        (lambda x: x.movedim(1, -1).flatten(1, 2).mT.unflatten(2, (4, 4)), 8),
        (lambda x: functional.interpolate(x, scale_factor=2), 8),
        (lambda x: functional.adaptive_avg_pool2d(x, 1), 8),
        (lambda x: functional.max_pool2d(x, 2, return_indices=True)[0], 8),
        (lambda x: functional.normalize(x, dim=2), 8),
        (lambda x: x.double().type_as(x), 8),
        (lambda x: torch.where(x > 0, x, x.mean((2, 3), keepdim=True)), 8),
        (lambda x: torch.softmax(x.flatten(2), -1).view_as(x), 8),
    ],
)
def test_reductions_and_pools_leave_the_other_channels_in_place(shrink, width):
    model = between(lambda net, x: shrink(x), 8, width)
    assert found(model, IMAGE)["a"][Z] == EIGHT


@pytest.mark.parametrize(
    "shrink",
    [
        lambda x: x.mean(1, keepdim=True),
        lambda x: x.max(1, keepdim=True)[0],
        lambda x: x.norm(dim=1, keepdim=True),
        lambda x: x.std(1, keepdim=True),
        lambda x: x.var(1)[:, None],
    ],
)
def test_channels_that_are_reduced_are_gone_behind(shrink):
    model = between(lambda net, x: shrink(x), 8, 1)
    assert found(model, IMAGE)["a"] == dict.fromkeys([A, ("a.bias", 0)], EIGHT)


def test_unbatched_images_are_pooled_over_their_pixels():
    model = between(lambda net, x: functional.max_pool2d(x, 2))
    assert found(model, IMAGE[0])["a"][Z] == EIGHT


def test_forward_that_depends_on_the_data_is_an_error_that_says_so():
    def flow(net, x):
        return net.a(x) if x.sum().item() > 0 else net.a(-x)

    with pytest.raises(PruningError, match=r"Net cannot be traced.*depend on the values of its"):
        found(Net(flow, a=conv(3, 4)), IMAGE)


def test_unknown_engine_is_an_error():
    with pytest.raises(PruningError, match="'slimkit', 'export' or 'torch-pruning', not 'fx'"):
        find_groups(nn.Linear(2, 2), (torch.zeros(1, 2),), "fx")


def test_analysis_is_the_same_every_time_and_leaves_the_model_alone():
    model, inputs = make("squeeze_excite")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert found(model, *inputs) == found(model, *inputs)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def places(coupling):
    """Each group as the set of (tensor, dimension, positions of one channel)."""
    return {
        frozenset(
            (m.tensor, m.dim, tuple((m.channel == c).nonzero().flatten().tolist()))
            for m in group.members
            if (m.channel == c).any()
        )
        for group in coupling.groups
        for c in range(group.channels)
    }


def vgg():
    layers = [conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3))


def mobilenet():
    def flow(net, x):
        x = net.stem(x)
        return net.head(pooled(x + net.block(x)))

    block = [conv(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, groups=8), nn.BatchNorm2d(8)]
    block += [nn.ReLU6(), conv(8, 4, 1), nn.BatchNorm2d(4)]
    return Net(flow, stem=conv(3, 4), block=nn.Sequential(*block), head=nn.Linear(4, 3))


def densenet():
    def flow(net, x):
        x = net.stem(x)
        for norm, layer in zip(net.norms, net.layers, strict=True):
            x = torch.cat([x, layer(functional.relu(norm(x)))], 1)
        return net.head(pooled(x))

    norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6)])
    layers = nn.ModuleList([conv(4, 2), conv(6, 2)])
    return Net(flow, stem=conv(3, 4), norms=norms, layers=layers, head=nn.Linear(8, 3))


BEYOND_THE_SECOND_ENGINE = {"chunked", "grouped", "functional_call", "flipped"}
BOTH = {
    **{
        build.__name__: lambda b=build: (b().eval(), (IMAGE,))
        for build in (vgg, mobilenet, densenet)
    },
    **{name: lambda n=name: make(n) for name in PRUNABLE.keys() - BEYOND_THE_SECOND_ENGINE},
}


@pytest.mark.parametrize("name", sorted(BOTH))
def test_both_engines_find_the_same_channels(name):
    model, inputs = BOTH[name]()
    ours = places(analyse(model, inputs))
    assert ours
    assert ours == places(analyse(model, inputs, engine="torch-pruning"))


class Standardized(nn.Conv2d):
    """A convolution with its weight standardized over what each filter reads, as NFNets have."""

    def forward(self, x):
        flat = self.weight.reshape(1, len(self.weight), -1)
        weight = functional.batch_norm(flat, None, None, training=True, momentum=0.0)
        return functional.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


def test_a_standardized_weight_lets_the_channels_go_that_it_reads():
    model = nn.Sequential(conv(3, 8), nn.ReLU(), Standardized(8, 8, 3), nn.ReLU(), conv(8, 2))
    assert proven(model, IMAGE) == ["0", "2"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), ratio=st.sampled_from([0.5, 0.7, 0.95]))
def test_any_pruned_network_computes_what_the_original_does_without_the_channels(seed, ratio):
    assert_right(seed, ratio)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=2000, deadline=None)
@given(seed=st.integers(0, 10**9), ratio=st.sampled_from([0.5, 0.7, 0.95]))
def test_thousands_of_pruned_networks_compute_the_same(seed, ratio):
    assert_right(seed, ratio)


def assert_right(seed, ratio):
    """Prune a random network; compare it with one that is zeroed by hand, and train it a step."""
    model = random_net(seed)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        small = prune(model, IMAGE, "random", target={"ratio": ratio})
    except PruningError as error:  # of few channels that all depend on each other
        assume("nothing was pruned: no channel may go" not in str(error))
        raise
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    expected = zeroed_where_made(model, IMAGE, small.slimkit_pruning.kept)
    atol = 1e-4 * expected.abs().max().item()
    assert torch.allclose(small(IMAGE), expected, rtol=1e-3, atol=atol)
    reasons = {OUTPUT, "it has a single channel", "flatten of a single channel", FIRST}
    assert set(small.slimkit_pruning.frozen.values()) <= reasons
    small.train()(IMAGE).square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())
    assert small.head.bias.grad.abs().sum() > 0
