"""Heads of attention, their dimensions, and the numbers in the user's code that hold them."""

import pytest
import torch
from models import Net, lived_in, zeroed
from torch import nn
from torch.nn import functional

import slimkit
from slimkit.errors import ArtifactError, PruningError
from slimkit.pruning.engines import find_groups
from slimkit.pruning.prune import analyse, prune

ROWS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))


class Attention(nn.Module):
    """Attention as vision transformers write it, with its sizes as whole numbers."""

    def __init__(self, flow, heads=4, head_dim=6, **options):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, head_dim, heads * head_dim
        self.scale, self.tokens = head_dim**-0.5, 5
        self.flow, self.options = flow, options
        size = self.attn_dim
        if flow is separate:
            self.q, self.k, self.v = (nn.Linear(12, size) for _ in range(3))
        else:
            self.qkv = nn.Linear(12, 3 * size)
        self.proj = nn.Linear(size, 12)

    def forward(self, x):
        x = x[:, : self.tokens]
        n, t, _ = x.shape
        q, k, v = self.flow(self, x)
        if self.options.get("by_hand"):
            y = torch.softmax((q * self.scale) @ k.transpose(-2, -1), -1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, self.attn_dim))


def fused(net, x):
    n, t, _ = x.shape
    return net.qkv(x).reshape(n, t, 3, net.num_heads, net.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def in_parts(net, x):
    n, t, _ = x.shape
    parts = net.qkv(x).chunk(3, -1)
    return [p.reshape(n, t, net.num_heads, net.head_dim).transpose(1, 2) for p in parts]


def separate(net, x):
    n, t, _ = x.shape
    parts = [layer(x) for layer in (net.q, net.k, net.v)]
    return [p.view(n, t, net.num_heads, net.head_dim).transpose(1, 2) for p in parts]


FLOWS = [fused, in_parts, separate]


def block(flow, **options):
    """Attention between two layers, which keep their channels."""
    torch.manual_seed(5)
    model = Net(
        lambda net, x: net.head(net.attn(net.stem(x))),
        stem=nn.Linear(12, 12),
        attn=Attention(flow, **options),
        head=nn.Linear(12, 3),
    )
    return lived_in(model).eval()


@pytest.mark.parametrize("by_hand", [False, True], ids=["fused product", "by hand"])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    ("attention", "sizes"),
    [
        ("heads", {"num_heads": 2, "head_dim": 6, "attn_dim": 12}),
        ("dimensions", {"num_heads": 4, "head_dim": 3, "attn_dim": 12}),
    ],
)
def test_attention_without_half_computes_what_zeroing_the_half_does(
    flow, attention, sizes, by_hand
):
    model = block(flow, by_hand=by_hand)
    small = prune(
        model, ROWS, target={"ratio": 0.5}, attention=attention, protect=["stem", "attn.proj"]
    )
    attn = small.attn
    assert {name: getattr(attn, name) for name in sizes} == sizes
    assert attn.proj.in_features == 12
    expected = zeroed(model, small.slimkit_pruning.kept)(ROWS)
    assert expected.std() > 0.01
    torch.testing.assert_close(small(ROWS), expected, rtol=1e-4, atol=1e-5)
    assert (model.attn.num_heads, model.attn.head_dim) == (4, 6)


@pytest.mark.parametrize("flow", FLOWS)
def test_whole_heads_go_and_stay(flow):
    model = block(flow)
    small = prune(
        model, ROWS, target={"ratio": 0.5}, attention="heads", protect=["stem", "attn.proj"]
    )
    heads = torch.tensor(small.slimkit_pruning.kept["attn.proj.weight"][1]).reshape(-1, 6)
    assert len(heads) == 2
    assert all((head == torch.arange(6) + head[0]).all() and head[0] % 6 == 0 for head in heads)


def test_the_head_that_matters_least_goes():
    model = block(fused)
    with torch.no_grad():
        model.attn.qkv.weight.view(3, 4, 6, 12)[:, 2] *= 0.01
        model.attn.proj.weight.view(12, 4, 6)[:, 2] *= 0.01
    small = prune(
        model, ROWS, target={"ratio": 0.25}, attention="heads", protect=["stem", "attn.proj"]
    )
    kept = small.slimkit_pruning.kept["attn.proj.weight"][1]
    assert kept == [*range(12), *range(18, 24)]


def test_a_number_that_only_happens_to_be_equal_stays():
    model = block(fused)
    model.attn.tokens = 4  # as many as there are heads
    small = prune(
        model, ROWS, target={"ratio": 0.5}, attention="heads", protect=["stem", "attn.proj"]
    )
    assert (small.attn.num_heads, small.attn.tokens) == (2, 4)


def test_values_that_need_no_number_do_not_set_that_of_the_queries():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.dim = 2, 6
            self.qk, self.v, self.out = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            n, t, _ = x.shape
            q, k = self.qk(x).reshape(n, t, 2, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            v = self.v(x).reshape(n, t, self.heads, -1).transpose(1, 2)
            y = functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2))

    model = nn.Sequential(Half(), Half(), nn.Linear(12, 3)).eval()
    small = prune(model, ROWS, ratios={"*.qk": 0.5, "*.v": 0.8})
    assert [(half.dim, half.v.out_features) for half in small[:2]] == [(3, 4), (3, 4)]
    expected = zeroed(model, small.slimkit_pruning.kept)(ROWS)
    torch.testing.assert_close(small(ROWS), expected, rtol=1e-4, atol=1e-5)


def test_heads_that_the_code_takes_from_elsewhere_stay_with_the_reason():
    def flow(net, x):
        n, t, c = x.shape
        return net.qkv(x).reshape(n, t, 3, 4, c // 2).permute(2, 0, 3, 1, 4).unbind(0)

    coupling = analyse(block(flow), (ROWS,), attention="heads")
    assert "attn.qkv" in coupling.frozen
    assert "the cut model does not run" in coupling.frozen["attn.qkv"]


@pytest.mark.parametrize("attention", ["heads", "dimensions"])
def test_the_numbers_are_saved_and_come_back(attention, tmp_path):
    model = block(fused)
    small = prune(model, ROWS, target={"flops": 0.5}, attention=attention)
    assert small.slimkit_pruning.attributes
    again = slimkit.load(slimkit.save(small, tmp_path / "small"), model=lambda: block(fused))
    assert again.attn.attn_dim == small.attn.attn_dim
    torch.testing.assert_close(again(ROWS), small(ROWS), rtol=0, atol=0)
    assert again.slimkit_pruning == small.slimkit_pruning


def test_a_model_without_the_number_is_refused(tmp_path):
    small = prune(block(fused), ROWS, target={"flops": 0.5}, attention="heads")
    folder = slimkit.save(small, tmp_path / "small")
    other = block(fused)
    del other.attn.attn_dim
    with pytest.raises(ArtifactError, match=r"no whole number 'attn.attn_dim'"):
        slimkit.load(folder, model=other)


@pytest.mark.parametrize("first", ["heads", "dimensions"])
def test_attention_can_be_pruned_twice_and_loads_into_the_first_original(first, tmp_path):
    second = {"heads": "dimensions", "dimensions": "heads"}[first]
    options = {"target": {"ratio": 0.5}, "protect": ["stem", "attn.proj"]}
    once = prune(block(fused), ROWS, attention=first, **options)
    twice = prune(once, ROWS, attention=second, **options)
    assert (twice.attn.num_heads, twice.attn.head_dim, twice.attn.attn_dim) == (2, 3, 6)
    again = slimkit.load(slimkit.save(twice, tmp_path / "small"), model=lambda: block(fused))
    torch.testing.assert_close(again(ROWS), twice(ROWS), rtol=0, atol=0)


def test_attention_must_be_heads_or_dimensions():
    with pytest.raises(PruningError, match="attention must be 'dimensions' or 'heads', not 'all'"):
        find_groups(block(fused), (ROWS,), attention="all")


class Biased(nn.Module):
    """Keeps the bias of each head for evaluation, as LeViT does, until its mode is set."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.kept = 4, {}
        self.qkv, self.proj = nn.Linear(12, 72), nn.Linear(24, 12)
        self.bias = nn.Parameter(torch.randn(4, 1, 1))

    def train(self, mode=True):
        self.kept = {}
        return super().train(mode)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, self.num_heads, -1).split([6, 6, 6], -1)
        bias = self.bias * 2 if self.training else self.kept.setdefault("bias", self.bias * 2)
        scores = q.transpose(1, 2) @ k.transpose(1, 2).transpose(-2, -1) + bias
        return self.proj((scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


def test_what_a_module_kept_of_its_old_weights_is_forgotten():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), Biased(), nn.Linear(12, 2)).eval()
    model(ROWS)
    small = prune(model, ROWS, target={"ratio": 0.5}, attention="heads", protect=["0", "1.proj"])
    assert small[1].num_heads == 2
    assert small[1].bias.shape == (2, 1, 1)
    assert small(ROWS).shape == (2, 5, 2)


class OpenEnded(nn.Module):
    """Attention whose code leaves the size of a head open: the number of heads is the constant."""

    def __init__(self, norm=False):
        super().__init__()
        self.h = 4
        self.norm = nn.LayerNorm(12) if norm else nn.Identity()
        self.q, self.k, self.v = (nn.Linear(12, 24) for _ in range(3))
        self.o = nn.Linear(24, 12)

    def forward(self, x):
        n, t, _ = x.shape
        y = self.norm(x)
        q, k, v = (f(y).view(n, t, self.h, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.o(y)


@pytest.mark.parametrize("norm", [False, True])
def test_whole_heads_are_not_read_as_halves_of_others(norm):
    """Heads can change places in the dense model, which says nothing about the cut one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), OpenEnded(norm), nn.Linear(12, 3)).eval()
    small = prune(
        model, ROWS, target={"ratio": 0.5}, attention="heads", protect=["0", "1.o", "1.norm"]
    )
    assert small[1].h == 2
    expected = zeroed(model, small.slimkit_pruning.kept)(ROWS)
    torch.testing.assert_close(small(ROWS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_attention_that_is_called_twice_is_rescaled_once(tied):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = OpenEnded(), nn.Linear(12, 3)
            self.b = self.a if tied else None

        def forward(self, x):
            return self.head((self.b or self.a)(self.a(x)))

    torch.manual_seed(0)
    model = Twice().eval()
    small = prune(model, ROWS, target={"ratio": 0.5}, protect=["a.o"])
    assert small.a.q.out_features == 12
    expected = zeroed(model, small.slimkit_pruning.kept)(ROWS)
    torch.testing.assert_close(small(ROWS), expected, rtol=1e-4, atol=1e-5)


def test_a_number_that_need_not_change_stays():
    model = block(fused)
    model.attn.tokens = 4
    rows = ROWS[:, :2]  # an example too short to tell
    small = prune(
        model, rows, target={"ratio": 0.5}, attention="heads", protect=["stem", "attn.proj"]
    )
    assert (small.attn.num_heads, small.attn.tokens) == (2, 4)
    assert small(ROWS).shape == model(ROWS).shape
