"""Exact rewrites leave the outputs as they were, and do what they say in every place."""

import pytest
import torch
from models import Net
from rewritten_nets import Drops, Reshapes, Slices, Stream, alive, sixes
from torch import nn
from torch.nn import functional

import slimkit
from slimkit.errors import RewritingError
from slimkit.rewriting.replacements import windows

IMAGE = torch.randn(2, 3, 12, 18, generator=torch.Generator().manual_seed(0))


def close(before, after, x):
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_a_focus_stem_becomes_one_convolution_of_the_image(kernel, stride):
    net = alive(Slices(kernel, stride))
    fast = slimkit.rewrite(net, IMAGE, ["focus-to-conv"])
    assert fast.conv.weight.shape == (6, 3, 2 * kernel, 2 * kernel)
    close(net, fast, IMAGE)
    with torch.no_grad():  # the convolution alone, without slimkit's forward
        by_hand = functional.conv2d(
            IMAGE, fast.conv.weight, fast.conv.bias, 2 * stride, 2 * (kernel // 2)
        )
        expected = functional.silu(net.bn(by_hand))
    torch.testing.assert_close(net(IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_slices_are_found_by_what_they_do():
    net = alive(Reshapes())
    fast = slimkit.rewrite(net, IMAGE, "focus-to-conv")
    assert fast.conv.kernel_size == fast.conv.stride == (3, 3)
    close(net, fast, IMAGE)
    module = alive(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3, padding=1)))
    fast = slimkit.rewrite(module, IMAGE, "focus-to-conv")
    assert fast[1].in_channels == 3
    close(module, fast, IMAGE)


def test_the_slices_are_not_computed_by_the_rewritten_model():
    from slimkit.calls import trace

    fast = slimkit.rewrite(alive(Slices()), IMAGE, "focus-to-conv")
    calls = trace(fast, (IMAGE,)).calls
    conv = next(call for call in calls if call.op == "conv2d")
    assert conv.inputs == (0,)  # the image itself


def test_slices_with_a_second_reader_are_left_with_the_reason():
    def flow(net, x):
        y = functional.pixel_unshuffle(x, 2)
        return net.conv(y).mean() + y.mean()

    net = Net(flow, conv=nn.Conv2d(12, 4, 1))
    with pytest.raises(RewritingError, match=r"found nothing to do in Net \(conv: others read"):
        slimkit.rewrite(net, IMAGE, "focus-to-conv")


def test_a_rewritten_stem_learns_like_the_one_it_was():
    net = alive(Slices())
    fast = slimkit.rewrite(net, IMAGE, "focus-to-conv")
    for model in (net, fast):
        model(IMAGE).square().mean().backward()
    spread = torch.zeros_like(fast.conv.weight)
    order = [(row, column) for column in (0, 1) for row in (0, 1)]
    for k, (row, column) in enumerate(order):
        spread[:, :, row::2, column::2] = net.conv.weight.grad[:, 3 * k : 3 * k + 3]
    torch.testing.assert_close(fast.conv.weight.grad, spread, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("size", "out"), [(14, 7), (3, 2), (9, 1), (7, 7), (5, 4), (8, 3), (7, 4)])
def test_windows_are_those_of_torch(size, out):
    x = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(1))
    expected = functional.adaptive_max_pool1d(x, out)
    found = windows(size, out)
    if found is None:
        assert size % out
    else:
        assert torch.equal(functional.max_pool1d(x, *found), expected)


def test_adaptive_pooling_is_fixed_where_it_is_called_and_right_at_other_shapes():
    def flow(net, x):
        x = functional.adaptive_max_pool2d(net.pool(x), (4, None))
        return functional.adaptive_avg_pool2d(x, 1)

    net = Net(flow, pool=nn.AdaptiveAvgPool2d((8, 6)))
    x = torch.randn(2, 3, 16, 18)
    fast = slimkit.rewrite(net, x, "fixed-pooling")
    assert fast.slimkit_rewriting.done[0].places == 3
    close(net, fast, x)
    close(net, fast, torch.randn(1, 3, 24, 12))
    close(net, fast, torch.randn(1, 3, 13, 11))  # no windows are alike: as it was
    program = torch.export.export(fast.eval(), (x,), strict=False)
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [op for op in ops if "adaptive" in op]


def test_pooling_over_unlike_windows_is_left_with_the_reason():
    with pytest.raises(RewritingError, match=r"windows over 12x18 .* are not alike"):
        slimkit.rewrite(nn.Sequential(nn.AdaptiveAvgPool2d(7)), IMAGE, "fixed-pooling")


def test_dropout_and_identities_go_and_the_names_of_layers_stay():
    net, x = Drops().eval(), torch.randn(4, 8)
    fast = slimkit.rewrite(net, x, "remove-noops")
    assert list(fast.body._modules) == ["0", "3", "4"]
    assert isinstance(fast.drop, nn.Identity)
    assert fast.state_dict().keys() == net.state_dict().keys()
    done = fast.slimkit_rewriting.done[0]
    assert done.places == 4  # two in the Sequential, one beside it, one as a function
    assert done.left == {"hook": "the code of its parent calls it"}
    close(net, fast, x)
    assert torch.equal(fast.train()(x), fast.eval()(x))  # nothing is dropped in training, too


def test_dropout_that_is_active_in_evaluation_is_left():
    net = Net(lambda net, x: functional.dropout(net.fc(x)), fc=nn.Linear(8, 8))
    with pytest.raises(RewritingError, match="active in evaluation"):
        slimkit.rewrite(net, torch.randn(2, 8), "remove-noops")


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Softplus])
def test_padded_channels_change_nothing_whatever_is_made_of_a_zero(act):
    net, x = alive(sixes(act)), torch.randn(2, 3, 8, 8)
    wide = slimkit.rewrite(net, x, [{"name": "pad-channels", "options": {"multiple": 8}}])
    assert [wide[i].weight.shape[:2] for i in (0, 3, 6)] == [(8, 3), (8, 1), (16, 8)]
    assert wide[3].groups == 8
    assert wide[10].in_features == 16 * 16  # sixteen places behind each channel
    close(net, wide, x)


def test_a_residual_stream_and_a_concatenation_grow_in_step():
    net, x = Stream().eval(), torch.randn(2, 3, 8, 8)
    wide = slimkit.rewrite(net, x, [{"name": "pad-channels", "options": {"multiple": 4}}])
    assert wide.body.weight.shape[:2] == (8, 8)
    assert wide.last.weight.shape[:2] == (8, 16)
    assert torch.equal(wide.last.weight[:7, :5], net.last.weight[:, :5])
    assert torch.equal(wide.last.weight[:7, 8:14], net.last.weight[:, 5:])
    close(net, wide, x)


def test_an_image_of_six_channels_is_filled_up_in_front_of_the_convolution():
    net = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 6, 8, 8)
    chosen = [{"name": "pad-channels", "options": {"images": True}}]
    wide = slimkit.rewrite(net, x, chosen)
    assert wide[0].weight.shape == (8, 8, 3, 3)
    assert wide[0].in_channels == 8
    assert torch.equal(wide[0].weight[:, 6:], torch.zeros(8, 2, 3, 3))
    close(net, wide, x)
    program = torch.export.export(wide.eval(), (x,), strict=False)
    first = next(node for node in program.graph.nodes if "conv" in str(node.target))
    assert first.args[0].meta["val"].shape == (2, 8, 8, 8)


def test_channels_that_fit_already_are_nothing_to_do():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(RewritingError, match="found nothing to do"):
        slimkit.rewrite(net, IMAGE, "pad-channels")


def test_channels_that_a_norm_runs_over_are_left_with_the_reason():
    net = nn.Sequential(
        nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)
    )
    x = torch.randn(4, 8)
    wide = slimkit.rewrite(net, x, "pad-channels")
    assert [wide[i].out_features for i in (0, 2, 4)] == [6, 16, 3]
    left = wide.slimkit_rewriting.done[0].left
    assert left["0"] == "something is computed over all of its channels"
    close(net, wide, x)
