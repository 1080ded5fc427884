"""The finished model: batch-norm folded, weights integer, computed as on the device."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from models import Net, conv
from nets import INPUTS, TENSORS, Shifted, conv_norm, lively, normal, residual_net, simulated
from torch import Tensor, nn
from torch.nn import functional as F

import slimkit
from slimkit.errors import ExportError
from slimkit.interfaces import Grid
from slimkit.quantization.finished import finish

X = normal(1, 3, 8, 8, seed=5)


def constants(program) -> dict[str, torch.Tensor]:
    return dict(program.state_dict) | dict(program.constants)


def operators(program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def with_gammas(*gammas: float, bias: bool = False) -> nn.Module:
    net = lively(
        nn.Sequential(nn.Conv2d(3, len(gammas), 3, bias=bias), nn.BatchNorm2d(len(gammas)))
    )
    net[1].weight.data = torch.tensor(gammas)
    return net.eval()


@pytest.mark.parametrize("bias", [True, False])
def test_folded_float_model_computes_the_same(bias: bool) -> None:
    net = with_gammas(1.5, -0.7, 0.0, 1e-3, bias=bias)
    program = finish(net, (X,)).program
    torch.testing.assert_close(program.module()(X), net(X), rtol=1e-5, atol=1e-5)
    assert not any("batch_norm" in name for name in operators(program))


def test_batch_norm_behind_a_linear_layer_folds() -> None:
    net = lively(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))).eval()
    x = normal(1, 6)
    program = finish(net, (x,)).program
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)
    assert not any("batch_norm" in name for name in operators(program))


def test_batch_norm_does_not_fold_where_somebody_else_reads_the_convolution() -> None:
    def flow(net, x):
        y = net.a(x)
        return net.bn(y) + y

    net = lively(Net(flow, a=conv(3, 4), bn=nn.BatchNorm2d(4))).eval()
    program = finish(net, (X,)).program
    torch.testing.assert_close(program.module()(X), net(X), rtol=1e-5, atol=1e-5)
    assert any("batch_norm" in name for name in operators(program))


def test_batch_norm_folds_into_each_call_of_a_shared_convolution() -> None:
    def flow(net, x):
        return net.second(net.a(net.first(net.a(x))))

    net = lively(Net(flow, a=conv(3, 3), first=nn.BatchNorm2d(3), second=nn.BatchNorm2d(3))).eval()
    torch.testing.assert_close(finish(net, (X,)).program.module()(X), net(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", [INPUTS, TENSORS])
@pytest.mark.parametrize("bias", [True, False])
def test_program_computes_what_the_simulation_does_for_all_gammas(scheme, bias: bool) -> None:
    net = with_gammas(1.5, -0.7, 0.0, 1e-3, bias=bias)
    small = simulated(net, [X], scheme).eval()
    out = finish(small, (X,)).program.module()(X)
    torch.testing.assert_close(out, small(X), rtol=1e-4, atol=1e-4)


def test_shift_of_an_all_but_silent_channel_survives_as_an_integer() -> None:
    net = with_gammas(1e-9, 1e-20, 1.0)
    net[1].bias.data = torch.tensor([1.0, -2.0, 0.5])
    small = simulated(net, [X], TENSORS).eval()
    out = finish(small, (X,)).program.module()(X)
    torch.testing.assert_close(out, small(X), rtol=1e-4, atol=1e-4)


def test_integers_of_the_program_are_numpys() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    small = simulated(net, [X], TENSORS).eval()
    found = constants(finish(small, (X,)).program)
    w = net[0].weight.detach().numpy().astype(np.float64)
    x = X.numpy().astype(np.float64)
    scale = np.abs(w).max((1, 2, 3)) / 127
    step = (x.max() - x.min()) / 255
    bias = np.rint(net[0].bias.detach().numpy() / (scale * step))
    by_kind = {t.dtype: t.numpy() for t in found.values() if not t.is_floating_point()}
    np.testing.assert_array_equal(
        by_kind[torch.int8], np.rint(w / scale[:, None, None, None]).astype(np.int8)
    )
    assert np.abs(by_kind[torch.int32] - bias).max() <= 1  # float32 scales
    assert np.abs(by_kind[torch.int8]).max() == 127


def test_bias_scale_is_input_scale_times_weight_scale() -> None:
    small = simulated(nn.Sequential(nn.Conv2d(3, 4, 1)), [X], TENSORS).eval()
    found = constants(finish(small, (X,)).program)
    (bias_scale,) = (t for name, t in found.items() if name.endswith("bias_scale"))
    (scale,) = (t for name, t in found.items() if name.endswith("0_scale"))
    (name,) = small.fake.sites.activations
    assert torch.equal(bias_scale, scale * small.fake[name].qparams()[0])


def test_bias_stays_float_where_the_scheme_has_no_integer_bias() -> None:
    small = simulated(nn.Sequential(nn.Conv2d(3, 4, 1)), [X], INPUTS).eval()
    kinds = {t.dtype for t in constants(finish(small, (X,)).program).values()}
    assert torch.int32 not in kinds


@pytest.mark.parametrize("make", [conv_norm, residual_net])
def test_program_with_float_biases_equals_the_simulation(make) -> None:
    small = simulated(make(), [normal(16, 3, 8, 8)], INPUTS).eval()
    module = finish(small, (X,)).program.module()
    images = normal(20, 3, 8, 8, seed=2).split(1)
    differences = torch.cat([(module(x) - small(x)).abs().amax(1) for x in images])
    assert differences.median() < 1e-5  # a tie that float rounding flips moves a few samples
    assert differences.max() < 0.1


@pytest.mark.parametrize("make", [conv_norm, residual_net])
def test_program_with_integer_biases_is_near_the_simulation(make) -> None:
    small = simulated(make(), [normal(16, 3, 8, 8)], TENSORS).eval()
    module = finish(small, (X,)).program.module()
    images = normal(20, 3, 8, 8, seed=2)
    mine, theirs = torch.cat([module(x) for x in images.split(1)]), small(images)
    noise = (mine - theirs).square().sum() / theirs.square().sum()
    assert -10 * math.log10(noise.item()) > 30


def test_rounding_between_convolution_and_batch_norm_is_not_folded_away() -> None:
    scheme = dataclasses.replace(TENSORS, fuses=frozenset())
    small = simulated(conv_norm(), [normal(16, 3, 8, 8)], scheme).eval()
    assert "0:conv2d:0" in small.fake.sites.outputs
    out = finish(small, (X,)).program.module()(X)
    torch.testing.assert_close(out, small(X), rtol=1e-3, atol=1e-3)


def test_grids_wider_than_8_bits_keep_their_integers() -> None:
    scheme = dataclasses.replace(
        INPUTS, activations=Grid(bits=16), weights=Grid(bits=12, per_channel=True)
    )
    small = simulated(nn.Sequential(nn.Conv2d(3, 4, 1)), [X], scheme).eval()
    out = finish(small, (X,)).program.module()(X)
    torch.testing.assert_close(out, small(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [INPUTS, TENSORS])
def test_parameters_and_buffers_in_additions_go_through(scheme) -> None:
    small = simulated(Shifted(), [X], scheme).eval()
    out = finish(small, (X,)).program.module()(X)
    assert (out - small(X)).abs().median() < 1e-5  # but for a few ties


def test_replaced_tensors_are_not_in_the_program() -> None:
    net = conv_norm()
    found = constants(finish(simulated(net, [X], TENSORS).eval(), (X,)).program)
    largest = max(t.untyped_storage().nbytes() for t in found.values() if t.is_floating_point())
    assert largest <= 4 * 8  # scales; no float weight (216 and 640 values) is left
    assert sum(t.numel() for t in found.values() if t.dtype == torch.int8) == 216 + 640


def test_the_simulation_is_not_changed() -> None:
    small = simulated(conv_norm(), [X], TENSORS).eval()
    before, state = small(X), {k: v.clone() for k, v in small.state_dict().items()}
    finish(small, (X,))
    assert torch.equal(small(X), before)
    assert all(torch.equal(v, state[k]) for k, v in small.state_dict().items())


def test_a_forward_that_depends_on_values_cannot_be_exported() -> None:
    def flow(net, x):
        return net.a(x) if x.sum().item() > 0 else x

    with pytest.raises(ExportError, match=r"cannot write Net down.*values of its data"):
        finish(Net(flow, a=conv(3, 3)), (X,))


def test_what_cannot_be_written_down_is_said_in_one_error_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch.export cannot write Branches down"):
        finish(Branches(), (torch.ones(1, 3),))
    assert capfd.readouterr() == ("", "")


class Overwriting(nn.Module):
    """Overwrites what an idle dropout gives, which is what it reads, and reads that again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = F.relu_(self.drop(x))
        return self.b(y) + x


@torch.no_grad()
def test_what_overwrites_an_idle_dropout_overwrites_what_that_reads() -> None:
    torch.manual_seed(0)
    model, x = Overwriting().eval(), torch.randn(1, 3, 5, 5)
    program = finish(model, (x,)).program
    expected = model(x)
    for one in (program, program.run_decompositions()):
        torch.testing.assert_close(one.module()(x), expected)
    assert "dropout" not in str(program.graph)


@torch.no_grad()
def test_a_dropout_that_drops_always_stays() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5)

    assert "dropout" in str(finish(Noisy(), (torch.randn(1, 4),)).program.graph)


class Functional(nn.Module):
    """A batch-norm behind a convolution, called with what the model computes on the way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.last = kind, nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)
        self.gamma, self.beta = nn.Parameter(torch.rand(6) - 2), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        conv, kind = self.conv, self.kind
        bias = conv.bias * 3 + 1 if kind == "bias" else conv.bias
        return self.last(
            F.batch_norm(
                F.conv2d(x, conv.weight, bias),
                self.mean.clone() if kind == "mean" else self.mean,
                self.var.exp() if kind == "var" else self.var,
                self.gamma.abs() if kind == "gamma" else self.gamma,
                self.beta * 2 if kind == "beta" else self.beta,
                kind == "training",
                0.0,
            )
        )


@pytest.mark.parametrize("kind", ["none", "bias", "mean", "var", "gamma", "beta", "training"])
def test_a_batch_norm_of_computed_numbers_does_not_fold(kind: str) -> None:
    torch.manual_seed(0)
    net = Functional(kind).eval()
    program = finish(net, (X,)).program
    torch.testing.assert_close(program.module()(X), net(X), rtol=1e-4, atol=1e-4)
    assert any("batch_norm" in name for name in operators(program)) == (kind != "none")


@pytest.mark.parametrize("quantized", [False, True])
def test_a_forward_may_ask_for_the_shape_of_a_weight(quantized: bool) -> None:
    def flow(net, x):
        return net.conv(x) * net.conv[0].weight.shape[0] / len(net.conv[0].weight)

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    net = lively(Net(flow, conv=layer)).eval()
    x = normal(8, 3, 8, 8)
    made = slimkit.quantize(net, [x]) if quantized else net
    program = finish(made, (x[:1],)).program
    torch.testing.assert_close(
        program.module()(x[:1]), net(x[:1]), rtol=0, atol=0.2 if quantized else 1e-5
    )
    weight = next(v for k, v in constants(program).items() if k.endswith("conv.0.weight"))
    assert weight.numel() == 0  # no second copy is in the file


@pytest.mark.parametrize("view", [False, True])
def test_a_forward_that_changes_a_buffer_is_refused(view: bool) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            (self.seen[0] if view else self.seen).add_(1)
            return self.layer(x) + self.seen.sum()

    with pytest.raises(ExportError, match="forward of Counting changes seen, which no file keeps"):
        finish(Counting().eval(), (X,))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_torchscript_is_named_where_it_stands_in_the_way() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), scripted).eval()
    with pytest.raises(ExportError, match="1 of Sequential is TorchScript"):
        finish(model, (torch.randn(1, 3, 4, 4),))
