"""What is used again gives the same result as computing everything."""

import pytest
import torch
from models import PRUNABLE, Net, conv, lived_in, make
from torch import nn
from torch.nn import functional

from slimkit.calls import CallMode
from slimkit.pruning.prune import analyse
from slimkit.reuse import Reuse


class Counted(CallMode):
    """Names of the calls that are really computed: it lies under the replay."""

    def __init__(self, model):
        super().__init__(model)
        self.names = []

    def on_call(self, name, op, func, args, kwargs):
        self.names.append(name)
        return func(*args, **kwargs)


def halved_(model, paths):
    with torch.no_grad():
        for path in paths:
            model.get_parameter(path).mul_(0.5)


@pytest.mark.parametrize("name", sorted(PRUNABLE))
def test_every_groups_change_gives_what_a_whole_run_gives(name):
    model, inputs = make(name)
    parameters = dict(model.named_parameters())
    groups = analyse(model, inputs).groups
    changes = {g.name: {m.tensor for m in g.members} for g in groups}

    def run():
        return model(*inputs)

    reuse = Reuse(model, run, changes)
    with torch.no_grad():
        torch.testing.assert_close(reuse.unchanged(run), run())
        before = {path: p.clone() for path, p in parameters.items()}
        for group, paths in changes.items():
            halved_(model, paths & parameters.keys())
            assert group in reuse.runs
            torch.testing.assert_close(reuse.changed(group, run), run(), rtol=0, atol=0)
            for path, p in parameters.items():
                p.copy_(before[path])


def branches():
    """In-place operations in front of, beside and behind the branch that changes."""

    def flow(net, x):
        x = net.relu(net.bn(net.stem(x)))
        left = net.relu(net.left(x))
        right = functional.relu(net.right(x), inplace=True)
        right += 1
        left += right
        left[:, :2] = right[:, 2:4]
        return net.head(left.mean((2, 3)))

    layers = {"stem": conv(3, 8), "bn": nn.BatchNorm2d(8), "relu": nn.ReLU(inplace=True)}
    layers |= {"left": conv(8, 6), "right": conv(8, 6), "head": nn.Linear(6, 4)}
    return lived_in(Net(flow, **layers)).eval()


def test_only_what_is_behind_the_change_is_computed_even_among_operations_in_place():
    model, x = branches(), torch.randn(4, 3, 8, 8)
    reuse = Reuse(model, lambda: model(x), {"left": {"left.weight"}, "right": {"right.weight"}})
    reuse.unchanged(lambda: model(x))
    for change, other in (("left", "right"), ("right", "left"), ("left", "right")):
        halved_(model, [f"{change}.weight"])
        counted = Counted(model)
        with counted:
            fast = reuse.changed(change, lambda: model(x))
        torch.testing.assert_close(fast, model(x), rtol=0, atol=0)
        layers = {name.partition(":")[0] for name in counted.names if ":conv2d:" in name}
        assert layers == {change}, other
        with torch.no_grad():
            model.get_parameter(f"{change}.weight").mul_(2)


def test_work_outside_of_the_modules_is_done_with_the_true_values():
    encoder, decoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)
    model, x = nn.ModuleDict({"encoder": encoder, "decoder": decoder}), torch.randn(3, 4)

    def run():
        code = encoder(x) * 2
        return decoder(code + x).square()

    reuse = Reuse(model, run, {"decoder": {"decoder.weight"}, "encoder": {"encoder.0.weight"}})
    reuse.unchanged(run)
    halved_(model, ["decoder.weight"])
    torch.testing.assert_close(reuse.changed("decoder", run), run())
    decoder.weight.data.mul_(2)
    halved_(model, ["encoder.0.weight"])
    torch.testing.assert_close(reuse.changed("encoder", run), run())


def test_a_model_that_calls_otherwise_the_next_time_is_computed_whole():
    model, times = make("mlp")[0], []

    def run():
        out = model(torch.ones(2, 8))
        if len(times) > 1:
            out = model[4](model[3](model[2](torch.ones(2, 16))))
        times.append(1)
        return out

    reuse = Reuse(model, run, {"a": {"4.weight"}})
    reuse.unchanged(run)
    expected = run()
    torch.testing.assert_close(reuse.changed("a", run), expected)


def test_kept_tensors_are_those_at_the_border_only():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    x = torch.randn(5, 8)
    reuse = Reuse(model, lambda: model(x), {"last": {"5.weight"}})
    reuse.unchanged(lambda: model(x))
    whole = [n for n, out in reuse.kept.items() if out.untyped_storage().nbytes() >= 5 * 8 * 4]
    assert whole == ["4:linear:0"]
