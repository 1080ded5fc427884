"""`slimkit.rewrite` verifies, leaves the user's model alone, and says what it cannot do."""

import pytest
import torch
from models import Net
from rewritten_nets import Gates, Slices, alive
from torch import nn
from torch.nn import functional

import slimkit
from slimkit.copies import copied
from slimkit.errors import RewritingError
from slimkit.rewriting import rewrite as module
from slimkit.rewriting.changes import Swap, read, written
from slimkit.rewriting.found import Found
from slimkit.rewriting.known import REWRITES

IMAGE = torch.randn(1, 3, 8, 8)


def test_the_users_model_is_untouched():
    net = alive(Slices())
    before = net(IMAGE)
    slimkit.rewrite(net, IMAGE, ["focus-to-conv", "silu-to-hardswish"])
    assert net.conv.in_channels == 12
    assert "forward" not in vars(net)
    assert torch.equal(net(IMAGE), before)


def test_a_copy_of_a_rewritten_model_is_its_own():
    fast = slimkit.rewrite(alive(Slices()), IMAGE, ["focus-to-conv", "silu-to-hardswish"])
    twin = copied(fast)
    expected = fast(IMAGE)
    torch.nn.init.zeros_(fast.conv.weight)
    assert torch.equal(twin(IMAGE), expected)
    assert not torch.equal(fast(IMAGE), expected)


def test_a_child_computes_as_it_did_inside_a_rewritten_forward():
    class Inner(nn.Module):
        def forward(self, x):
            return functional.silu(x)

    net = Net(lambda net, x: functional.silu(net.inner(x)), inner=Inner())
    x = torch.randn(5)
    chosen = [{"name": "silu-to-hardswish", "options": {"at": ["inner"]}}]
    fast = slimkit.rewrite(net, x, chosen)
    assert torch.equal(fast(x), functional.silu(functional.hardswish(x)))
    outer = Net(lambda net, x: functional.silu(net.inner(x)), inner=nn.SiLU())
    fast = slimkit.rewrite(outer, x, [{"name": "silu-to-hardswish"}])
    assert torch.equal(fast(x), functional.hardswish(functional.hardswish(x)))


def test_arguments_of_a_rewritten_forward_are_known_by_name():
    import inspect

    class Two(nn.Module):
        def forward(self, x, *, scale=2.0):
            return functional.silu(x) * scale

    fast = slimkit.rewrite(Two(), torch.ones(3), "silu-to-hardswish")
    assert list(inspect.signature(fast.forward).parameters) == ["x", "scale"]
    assert torch.equal(fast(torch.ones(3), scale=3.0), 3 * functional.hardswish(torch.ones(3)))


def test_an_exact_rewrite_that_changes_outputs_is_refused(monkeypatch):
    def wrong(model, inputs):
        return Found([Swap("act", "Hardswish")])

    monkeypatch.setattr(module, "_function", lambda record: wrong)
    net = Gates()
    with pytest.raises(RewritingError, match="remove-noops is exact, but of Gates output 0"):
        slimkit.rewrite(net, torch.randn(4, 8), "remove-noops")
    assert isinstance(net.act, nn.SiLU)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["focus-to-cov"], "no rewrite is called 'focus-to-cov'; did you mean 'focus-to-conv'"),
        ([], "no rewrite is named"),
        (["gelu-to-tanh"], "gelu-to-tanh found nothing to do in Gates; leave it out"),
        ([{"name": "gelu-to-tanh", "options": {"an": []}}], "gelu-to-tanh: an: no such option"),
        ([{"name": "pad-channels", "options": {"multiple": 1}}], "should be at least 2, not 1"),
    ],
)
def test_what_cannot_be_done_is_said(chosen, message):
    with pytest.raises(RewritingError, match=message):
        slimkit.rewrite(Gates(), torch.randn(4, 8), chosen)


def test_a_model_that_does_not_run_is_said():
    with pytest.raises(RewritingError, match="Slices does not run on the example inputs"):
        slimkit.rewrite(Slices(), torch.randn(1, 4, 8, 8), "focus-to-conv")


def test_pruned_and_quantized_models_are_refused():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)), torch.randn(4, 8)
    small = slimkit.prune(net, x, target={"ratio": 0.5})
    with pytest.raises(RewritingError, match="pruned: rewrite it first"):
        slimkit.rewrite(small, x, "silu-to-hardswish")
    with pytest.raises(RewritingError, match="quantized: rewrite it first"):
        slimkit.rewrite(slimkit.quantize(net, [x], "torch"), x, "silu-to-hardswish")


def test_a_second_rewrite_adds_to_the_first():
    once = slimkit.rewrite(alive(Slices()), IMAGE, "focus-to-conv")
    twice = slimkit.rewrite(once, IMAGE, "silu-to-hardswish")
    assert [one.name for one in twice.slimkit_rewriting.done] == [
        "focus-to-conv",
        "silu-to-hardswish",
    ]
    assert len(once.slimkit_rewriting.done) == 1


def test_changes_survive_json():
    import json

    fast = slimkit.rewrite(alive(Slices()), IMAGE, ["focus-to-conv", "silu-to-hardswish"])
    changes = fast.slimkit_rewriting.changes
    assert [read(json.loads(json.dumps(written(c)))) for c in changes] == changes


def test_every_rewrite_is_on_its_page():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "rewriting.md").read_text()
    for known in REWRITES.values():
        kind = "exact" if known.exact else "approximate"
        assert f"| `{known.name}` | {kind} |" in page


def test_what_stays_is_said_once_a_reason():
    net = Net(
        lambda net, x: net.d(net.c(net.b(net.a(net.drop(x))))),
        drop=nn.Dropout(),
        **{name: nn.Identity() for name in "abcd"},
    )
    lines = str(slimkit.rewrite(net, torch.ones(3), "remove-noops").slimkit_rewriting).splitlines()
    assert lines[1] == "  left a, b, c and 1 more: the code of its parent calls it"
    assert len(lines) == 2
