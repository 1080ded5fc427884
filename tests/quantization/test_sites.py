"""Where the rounding is: the two placements, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import Net, conv
from nets import INPUTS, TENSORS, Shifted, normal
from torch import nn
from torch.nn import functional

import slimkit
from slimkit.calls import trace
from slimkit.errors import QuantizationError
from slimkit.quantization.sites import Sites, find_sites, prescribed

IMAGE = normal(1, 3, 8, 8)


def sites(flow, scheme=TENSORS, keep_float=(), inputs=(IMAGE,), **layers) -> Sites:
    return find_sites(trace(Net(flow, **layers), inputs), scheme, keep_float)


def test_inputs_placement_rounds_what_a_layer_reads_and_leaves_its_output() -> None:
    found = sites(lambda net, x: net.b(net.a(x)), INPUTS, a=conv(3, 4), b=conv(4, 4))
    assert found.inputs == {
        "a:conv2d:0": {0: "a:conv2d:0:in0"},
        "b:conv2d:0": {0: "b:conv2d:0:in0"},
    }
    assert found.outputs == {}
    assert found.weights == {
        "a:conv2d:0": ("a/weight:weight", "a.weight"),
        "b:conv2d:0": ("b/weight:weight", "b.weight"),
    }


def test_inputs_placement_rounds_both_sides_of_an_addition() -> None:
    found = sites(lambda net, x: net.a(x) + x, INPUTS, a=conv(3, 3))
    assert found.inputs[":add:0"] == {0: ":add:0:in0", 1: ":add:0:in1"}


def test_a_tensor_is_rounded_once_and_its_readers_share_the_quantizer() -> None:
    def flow(net, x):
        y = net.a(x)
        return net.b(y), net.c(y)

    found = sites(flow, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))
    assert found.outputs == {"a:conv2d:0": "a:conv2d:0:out"}
    assert found.inputs == {"a:conv2d:0": {0: "input0"}}


def test_batch_norm_and_relu_are_rounded_behind_not_between() -> None:
    def flow(net, x):
        return net.b(functional.relu(net.bn(net.a(x))))

    found = sites(flow, a=conv(3, 4), bn=nn.BatchNorm2d(4), b=conv(4, 4))
    assert found.outputs == {":relu:0": ":relu:0:out"}


def test_fusing_stops_where_somebody_else_reads_the_tensor_between() -> None:
    def flow(net, x):
        y = net.a(x)
        return net.b(functional.relu(y) + y)

    found = sites(flow, a=conv(3, 4), b=conv(4, 4))
    assert found.outputs["a:conv2d:0"] == "a:conv2d:0:out"
    assert found.outputs[":relu:0"] == ":relu:0:out"


def test_both_branches_and_the_sum_of_a_residual_are_rounded() -> None:
    def flow(net, x):
        x = net.a(x)
        return net.c(functional.relu(net.b(x) + x))

    found = sites(flow, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2))
    assert set(found.outputs) == {"a:conv2d:0", "b:conv2d:0", ":relu:0"}


def test_inputs_and_output_of_a_concatenation_are_rounded() -> None:
    def flow(net, x):
        return net.c(torch.cat([net.a(x), net.b(x)], 1))

    found = sites(flow, a=conv(3, 4), b=conv(3, 2), c=conv(6, 2))
    assert set(found.outputs) == {"a:conv2d:0", "b:conv2d:0", ":cat:0"}


def test_inputs_placement_counts_the_tensors_inside_a_list() -> None:
    scheme = INPUTS.__class__(**{**vars(INPUTS), "operations": frozenset({"cat"})})
    found = sites(lambda net, x: torch.cat([x, net.a(x)], 1), scheme, a=conv(3, 4))
    assert found.inputs == {":cat:0": {0: ":cat:0:in0", 1: ":cat:0:in1"}}


@pytest.mark.parametrize("keeper", [nn.MaxPool2d(2), nn.Flatten()])
def test_a_keeper_passes_the_grid_on(keeper: nn.Module) -> None:
    def flow(net, x):
        y = net.keeper(net.a(x))
        return net.b(y.flatten(1))

    size = keeper(torch.zeros(1, 4, 8, 8)).numel()
    found = sites(flow, a=conv(3, 4), keeper=keeper, b=nn.Linear(size, 2))
    assert set(found.outputs.values()) == {"a:conv2d:0:out"}
    assert any(name.startswith("keeper:") for name in found.outputs)


def test_a_keeper_in_front_of_float_operations_only_is_not_rounded_again() -> None:
    def flow(net, x):
        return torch.exp(functional.max_pool2d(net.a(x), 2))

    assert set(sites(flow, a=conv(3, 4)).outputs) == {"a:conv2d:0"}


def test_a_keeper_of_the_model_input_shares_the_inputs_quantizer() -> None:
    found = sites(lambda net, x: net.a(functional.max_pool2d(x, 2)), a=conv(3, 4))
    assert found.inputs == {":max_pool2d:0": {0: "input0"}}
    assert found.outputs == {":max_pool2d:0": "input0"}


@pytest.mark.parametrize(("mode", "keeps"), [("nearest", True), ("bilinear", False)])
def test_interpolation_keeps_the_grid_only_where_it_mixes_no_values(mode: str, keeps: bool) -> None:
    def flow(net, x):
        return net.b(functional.interpolate(net.a(x), scale_factor=2, mode=mode))

    found = sites(flow, a=conv(3, 4), b=conv(4, 4))
    own = ":interpolate:0:out"
    assert found.outputs[":interpolate:0"] == ("a:conv2d:0:out" if keeps else own)


def test_the_final_output_stays_float() -> None:
    found = sites(lambda net, x: net.b(net.a(x)), a=conv(3, 4), b=conv(4, 4))
    assert "b:conv2d:0" not in found.outputs
    assert "b:conv2d:0" in found.weights


def test_an_output_that_an_integer_operation_reads_too_is_rounded() -> None:
    def flow(net, x):
        y = net.a(x)
        return y, net.b(y)

    assert set(sites(flow, a=conv(3, 4), b=conv(4, 4)).outputs) == {"a:conv2d:0"}


def test_functional_calls_are_met_like_modules() -> None:
    def flow(net, x):
        y = functional.conv2d(x, net.a.weight, net.a.bias, padding=1)
        return net.b(functional.relu(y))

    found = sites(flow, a=conv(3, 4), b=conv(4, 4))
    assert found.weights[":conv2d:0"] == ("a/weight:weight", "a.weight")
    assert found.outputs == {":relu:0": ":relu:0:out"}


def test_each_call_of_a_module_has_its_own_activations_and_they_share_the_weight() -> None:
    found = sites(lambda net, x: net.a(net.a(x)), INPUTS, a=conv(3, 3))
    assert found.activations == ["a:conv2d:0:in0", "a:conv2d:1:in0"]
    assert set(found.weights.values()) == {("a/weight:weight", "a.weight")}


@pytest.mark.parametrize("scheme", [INPUTS, TENSORS])
def test_in_place_operations_are_placed_like_others(scheme) -> None:
    layers = {"a": conv(3, 4), "b": conv(4, 4)}

    def apart(net, x):
        y = functional.relu(net.a(x))
        y = y + net.b(y)
        return net.b(functional.relu(y))

    def in_place(net, x):
        y = functional.relu(net.a(x), inplace=True)
        z = net.b(y)
        z += y
        return net.b(functional.relu(z, inplace=True))

    assert sites(in_place, scheme, **layers) == sites(apart, scheme, **layers)


@pytest.mark.parametrize("scheme", [INPUTS, TENSORS])
def test_adding_a_parameter_or_a_buffer_stays_float_with_a_reason(scheme) -> None:
    found = find_sites(trace(Shifted(), (IMAGE,)), scheme)
    reason = "one argument is a constant or both are the same tensor"
    assert found.skipped == {":add:0": reason, ":add:1": reason}
    assert not {":add:0", ":add:1"} & set(found.inputs)


def test_a_computed_weight_stays_float_with_a_reason() -> None:
    def flow(net, x):
        return functional.conv2d(x, net.a.weight / net.a.weight.norm(), padding=1)

    found = sites(flow, a=conv(3, 4))
    assert [*found.skipped] == [":conv2d:0"]
    assert found.skipped[":conv2d:0"].startswith("its weight is computed, not a parameter")
    assert found.weights == {}


@pytest.mark.parametrize("pattern", ["b", "*b", "b:conv2d:0", "?"])
def test_keep_float_takes_paths_and_call_names_with_wildcards(pattern: str) -> None:
    def flow(net, x):
        return net.after(net.b(x))

    found = sites(flow, INPUTS, (pattern,), b=conv(3, 4), after=conv(4, 4))
    assert found.skipped == {"b:conv2d:0": f"kept in float by {pattern!r}"}
    assert set(found.weights) == {"after:conv2d:0"}


def test_the_source_of_a_layer_is_the_quantizer_that_rounded_its_input() -> None:
    def flow(net, x):
        return net.b(functional.max_pool2d(functional.relu(net.a(x)), 2))

    traced = trace(Net(flow, a=conv(3, 4), b=conv(4, 4)), (IMAGE,))
    found = find_sites(traced, TENSORS)
    by_name = {call.name: call for call in traced.calls}
    assert found.source(by_name["b:conv2d:0"], traced) == ":relu:0:out"
    assert found.source(by_name["a:conv2d:0"], traced) == "input0"


def test_a_tail_that_mixes_quantities_stays_in_float() -> None:
    """A detector's boxes and scores: each is rounded where its layer makes it, not together."""

    def flow(net, x):
        y = net.stem(x)
        return torch.cat([net.boxes(y), net.scores(y).sigmoid()], 1).flatten(2).mT

    scheme = replace(TENSORS, operations=TENSORS.operations | {"cat", "sigmoid"})
    found = sites(flow, scheme, stem=conv(3, 4), boxes=conv(4, 4), scores=conv(4, 2))
    assert ":cat:0" not in found.outputs
    assert ":sigmoid:0" not in found.outputs
    assert found.skipped == dict.fromkeys(
        (":sigmoid:0", ":cat:0"), "no layer behind it reads integers"
    )
    assert found.outputs["boxes:conv2d:0"] != found.outputs["scores:conv2d:0"]


def test_a_concatenation_that_a_layer_reads_is_no_tail() -> None:
    scheme = replace(TENSORS, operations=TENSORS.operations | {"cat"})

    def flow(net, x):
        return net.b(torch.cat([net.a(x), x], 1))

    assert ":cat:0" in sites(flow, scheme, a=conv(3, 4), b=conv(7, 4)).outputs


def test_silu_in_steps_has_a_quantizer_inside() -> None:
    scheme = replace(TENSORS, steps=frozenset({"silu"}))
    found = sites(
        lambda net, x: net.b(functional.silu(net.a(x))), scheme, a=conv(3, 4), b=conv(4, 4)
    )
    assert found.inner == {":silu:0": ":silu:0:inner"}
    assert found.outputs[":silu:0"] == ":silu:0:out"
    assert found.outputs["a:conv2d:0"] == "a:conv2d:0:out"
    assert ":silu:0:inner" in found.activations


def test_float_outputs_round_only_what_is_read_as_integers() -> None:
    def flow(net, x):
        return net.b(functional.gelu(net.a(x)))

    layers = {"a": conv(3, 4), "b": conv(4, 4)}
    assert "a:conv2d:0" in sites(flow, TENSORS, **layers).outputs
    free = sites(flow, replace(TENSORS, float_outputs=True), **layers)
    assert free.outputs == {":gelu:0": ":gelu:0:out"}


def test_outputs_of_the_model_are_rounded_where_the_backend_has_no_float_behind_integers() -> None:
    layers = {"a": conv(3, 4), "b": conv(4, 4)}
    plain = sites(lambda net, x: net.b(net.a(x)), TENSORS, **layers)
    assert "b:conv2d:0" not in plain.outputs
    whole = sites(lambda net, x: net.b(net.a(x)), replace(TENSORS, rounds_outputs=True), **layers)
    assert whole.outputs["b:conv2d:0"] == "b:conv2d:0:out"


def test_grids_that_the_backend_prescribes_are_found_by_operation() -> None:
    scheme = replace(TENSORS, prescribed=(("sigmoid", 1 / 256, -128),))
    assert prescribed("neck.act:sigmoid:3:out", scheme) == (1 / 256, -128)
    assert prescribed(":silu:0:inner", scheme) == (1 / 256, -128)  # the sigmoid inside
    for free in (":silu:0:out", "a:conv2d:0:out", "input0", "sigmoid:conv2d:0:in0"):
        assert prescribed(free, scheme) is None


def test_depthwise_layers_stay_in_float_where_the_backend_says_so() -> None:
    def flow(net, x):
        return net.b(net.a(x))

    layers = {"a": nn.Conv2d(3, 3, 3, groups=3), "b": conv(3, 4)}
    found = sites(flow, replace(INPUTS, depthwise=False), **layers)
    assert list(found.weights) == ["b:conv2d:0"]
    assert "depthwise" in found.skipped["a:conv2d:0"]
    assert len(sites(flow, INPUTS, **layers).weights) == 2


def test_a_pattern_is_of_what_is_in_a_module_too() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer3 = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer3(x))

    small = slimkit.quantize(Stage(), [torch.randn(2, 3, 4, 4)], keep_float=["layer3"])
    assert [*small.fake.sites.weights] == ["head:conv2d:0"]
    with pytest.raises(QuantizationError, match="called 'laier3'; did you mean 'layer3"):
        slimkit.quantize(Stage(), [torch.randn(2, 3, 4, 4)], keep_float=["laier3"])


@pytest.mark.parametrize("bits", [1, 0, -3, 2.5, True, 9])
def test_a_width_that_no_grid_has_is_refused(bits) -> None:
    with pytest.raises(QuantizationError, match="choose weight_bits from 2 to 8"):
        slimkit.quantize(nn.Linear(8, 8), [torch.randn(2, 8)], weight_bits=bits)


def test_what_is_quantized_is_not_quantized_again() -> None:
    small = slimkit.quantize(nn.Linear(8, 8), [torch.randn(2, 8)])
    with pytest.raises(QuantizationError, match="quantized already, for onnxruntime"):
        slimkit.quantize(small, [torch.randn(2, 8)])
