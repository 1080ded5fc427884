"""`prune` in one line: a smaller model that computes what the big one does without its channels."""

import copy
import pickle
import re
import threading
from dataclasses import dataclass

import pytest
import torch
from models import PRUNABLE, Net, chunked, conv, functional_call, grouped, lived_in, make, mlp
from safetensors.torch import save
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from slimkit.errors import PluginError, PruningError
from slimkit.interfaces import Criterion
from slimkit.pruning.cost import CostModel
from slimkit.pruning.prune import prune

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
HALF = {"flops": 0.5}


def counted(model, inputs):
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2


def size(model):
    return sum(p.numel() for p in model.parameters())


def mib(model):
    """What a safetensors file of the model has behind its header."""
    data = save(dict(model.state_dict()))
    return (len(data) - 8 - int.from_bytes(data[:8], "little")) / 2**20


def silenced(model, kept):
    """The original model by hand: whatever was not kept is zero, in every tensor."""
    zeroed = copy.deepcopy(model)
    state = zeroed.state_dict()
    for name, dims in kept.items():
        for dim, positions in dims.items():
            gone = [i for i in range(state[name].shape[dim]) if i not in positions]
            if not name.endswith("running_var"):
                state[name].movedim(dim, 0)[gone] = 0.0
    return zeroed


@pytest.mark.parametrize("name", PRUNABLE)
class TestEveryModel:
    def test_has_half_of_its_macs_by_torchs_count(self, name):
        model, inputs = make(name)
        small = prune(model, inputs, target=HALF)
        assert 0.25 < counted(small, inputs) / counted(model, inputs) <= 0.5

    def test_has_at_most_six_tenths_of_its_parameters(self, name):
        model, inputs = make(name)
        small = prune(model, inputs, target={"params": 0.6})
        assert 0.3 < size(small) / size(model) <= 0.6

    def test_fits_into_seven_tenths_of_its_mib_in_a_file(self, name):
        model, inputs = make(name)
        small = prune(model, inputs, target={"size_mb": 0.7 * mib(model)})
        assert 0.3 * mib(model) < mib(small) <= 0.7 * mib(model)

    @pytest.mark.parametrize("ranking", ["local", "isomorphic"])
    def test_has_half_of_its_macs_in_every_ranking(self, name, ranking):
        model, inputs = make(name)
        small = prune(model, inputs, target=HALF, ranking=ranking)
        assert 0.2 < counted(small, inputs) / counted(model, inputs) <= 0.5

    def test_loses_what_ratios_say(self, name):
        model, inputs = make(name)
        small = prune(model, inputs, ratios={"*": 0.5})
        report = small.slimkit_pruning
        assert {after / before for before, after, _ in report.groups.values()} == {0.5}

    def test_computes_what_the_original_does_without_the_removed_channels(self, name):
        if name == "layernorm_mlp":
            pytest.skip("a LayerNorm over fewer channels is another function by design")
        model, inputs = make(name)
        small = prune(model, inputs, target=HALF)
        expected = silenced(model, small.slimkit_pruning.kept)(*inputs)
        assert torch.allclose(small(*inputs), expected, rtol=1e-4, atol=1e-5)

    def test_tensors_are_the_kept_positions_of_the_original(self, name):
        model, inputs = make(name)
        small = prune(model, inputs, target=HALF)
        state = small.state_dict()
        for tensor, original in model.state_dict().items():
            for dim, positions in small.slimkit_pruning.kept.get(tensor, {}).items():
                original = original.index_select(dim, torch.tensor(positions))
            assert torch.equal(state[tensor], original), tensor

    def test_leaves_the_original_untouched(self, name):
        model, inputs = make(name)
        before = {key: t.clone() for key, t in model.state_dict().items()}
        prune(model, inputs, target=HALF)
        assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
        assert not hasattr(model, "slimkit_pruning")

    def test_report_says_what_torch_counts(self, name):
        model, inputs = make(name)
        small = prune(model, inputs, target=HALF)
        report = small.slimkit_pruning
        assert report.macs == (counted(model, inputs), counted(small, inputs))
        assert report.parameters == (size(model), size(small))

    def test_gives_every_remaining_parameter_a_gradient(self, name):
        model, inputs = make(name)
        small = prune(model, inputs, target=HALF).train()
        small(*inputs).square().sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())

    def test_can_be_exported(self, name):
        model, inputs = make(name)
        small = prune(model, inputs, target=HALF)
        exported = torch.export.export(small, inputs).module()
        assert torch.allclose(exported(*inputs), small(*inputs), atol=1e-6)

    def test_is_the_same_every_time(self, name):
        model, inputs = make(name)
        kept = [prune(model, inputs, target=HALF).slimkit_pruning.kept for _ in range(2)]
        assert kept[0] == kept[1]


def test_state_dict_of_the_small_model_fits_another_small_model():
    model, inputs = make("chain")
    small, other = (prune(model, inputs, target=HALF) for _ in range(2))
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(*inputs), small(*inputs))


def test_small_model_survives_pickling():
    model, inputs = make("mlp")
    small = prune(model, inputs, target=HALF)
    assert torch.equal(pickle.loads(pickle.dumps(small))(*inputs), small(*inputs))


def test_small_model_can_be_trained_with_an_optimizer():
    model, inputs = make("chain")
    small = prune(model, inputs, target=HALF).train()
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = functional.cross_entropy(small(*inputs), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_pruning_again_reports_positions_in_the_first_original():
    model, inputs = make("chain")
    twice = prune(prune(model, inputs, target={"flops": 0.6}), inputs, target={"flops": 0.6})
    expected = silenced(model, twice.slimkit_pruning.kept)(*inputs)
    assert torch.allclose(twice(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_pruning_again_leaves_the_first_report_alone():
    model, inputs = make("chain")
    small = prune(model, inputs, target={"flops": 0.6})
    before = copy.deepcopy(small.slimkit_pruning.kept)
    prune(small, inputs, target={"flops": 0.6})
    assert small.slimkit_pruning.kept == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["chain", "residual", "mlp"])
def test_other_precisions_are_pruned_and_kept(name, dtype):
    model, inputs = make(name, dtype=dtype)
    small = prune(model, inputs, target=HALF)
    assert counted(small, inputs) <= 0.5 * counted(model, inputs)
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_least_important_channels_go():
    model, inputs = make("sigmoid_chain")
    with torch.no_grad():
        model[0].weight[[2, 5, 11]] *= 1e-3
        model[2].weight[:, [2, 5, 11]] *= 1e-3
    small = prune(model, inputs, target={"ratio": 3 / 16})
    assert small.slimkit_pruning.kept["0.weight"][0] == [
        i for i in range(16) if i not in (2, 5, 11)
    ]


def test_classifier_keeps_its_classes():
    model, inputs = make("chain")
    small = prune(model, inputs, target={"flops": 0.2})
    assert small(*inputs).shape == model(*inputs).shape
    assert small.slimkit_pruning.frozen["7"] == "its channels are the model's output"


@pytest.mark.parametrize("pattern", ["stem", "st*", "more"])
def test_protected_layer_and_all_that_share_its_channels_stay_whole(pattern):
    model, inputs = make("residual")
    small = prune(model, inputs, target={"flops": 0.85}, protect=[pattern])
    assert (small.stem.out_channels, small.down.out_channels < 6) == (8, True)
    assert small.slimkit_pruning.frozen["stem"] == f"protected by {pattern!r}"


def test_name_of_a_block_protects_the_layers_inside():
    block = nn.Sequential(nn.Linear(8, 12), nn.ReLU())
    model = nn.Sequential(block, nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 2))
    small = prune(model, torch.zeros(1, 8), target={"flops": 0.8}, protect=["0"])
    assert (small[0][0].out_features, small[1].out_features < 16) == (12, True)


def test_protected_layer_keeps_what_it_makes_and_may_read_less():
    model, inputs = make("mlp")
    small = prune(model, inputs, target={"ratio": 0.5}, protect=["2"])
    assert (small[2].out_features, small[2].in_features) == (12, 8)


def test_misspelt_protection_is_an_error_with_the_nearest_name():
    model, inputs = make("residual")
    with pytest.raises(PruningError, match="no layer of the model is called 'stern'.*'stem'"):
        prune(model, inputs, target=HALF, protect=["stern"])


@pytest.mark.parametrize("target", [{"ratio": 0.5}, {"flops": 0.9}])
def test_model_without_anything_to_prune_is_an_error(target):
    with pytest.raises(PruningError, match="its channels are the model's output"):
        prune(nn.Sequential(nn.Linear(8, 4)), torch.zeros(1, 8), target=target)


def test_ratio_too_small_to_remove_a_channel_is_an_error():
    model, inputs = make("mlp")
    with pytest.raises(PruningError, match="nothing was pruned"):
        prune(model, inputs, target={"ratio": 0.01})


def test_target_out_of_reach_is_an_error_with_the_best_in_reach():
    with pytest.raises(
        PruningError, match=r"cannot be reached: .* 0\.\d+ is left\. Left whole: 6: its"
    ):
        prune(grouped(), IMAGE, target={"flops": 0.01})


def flatter(monkeypatch, factor):
    """Let the prediction of every cut be too low by a factor."""
    predict = CostModel.predict

    def kind(self, kept):
        macs, parameters = predict(self, kept)
        return (macs * factor, parameters) if kept else (macs, parameters)

    monkeypatch.setattr(CostModel, "predict", kind)


def test_choice_is_tightened_where_the_prediction_was_too_kind(monkeypatch):
    model, inputs = make("mlp")
    flatter(monkeypatch, 0.8)
    small = prune(model, inputs, target=HALF)
    assert counted(small, inputs) / counted(model, inputs) <= 0.51


def test_target_that_is_missed_by_measurement_is_an_error(monkeypatch):
    model, inputs = make("mlp")
    flatter(monkeypatch, 1e-9)
    with pytest.raises(PruningError, match=r"cannot be reached: 0\.\d+ is left by measurement"):
        prune(model, inputs, target=HALF)


@pytest.mark.parametrize(
    "target",
    [{}, {"flops": 0}, {"flops": 1}, {"ratio": -0.1}, {"speed": 0.5}, {"flops": 0.5, "ratio": 0.5}],
    ids=str,
)
def test_bad_target_is_an_error(target):
    model, inputs = make("mlp")
    with pytest.raises(PruningError, match="target"):
        prune(model, inputs, target=target)


def labelled(shape, classes, count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield (
            torch.randn(shape, generator=generator),
            torch.randint(classes, shape[:1], generator=generator),
        )


def test_taylor_without_data_is_an_error_that_asks_for_it():
    model, inputs = make("mlp")
    with pytest.raises(PruningError, match="'taylor' needs gradients: pass data="):
        prune(model, inputs, "taylor", target=HALF)


def test_taylor_keeps_the_channels_that_the_labels_need():
    # class = sign of the first input; two hidden channels carry it, fourteen carry noise away
    model = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Linear(16, 2, bias=False))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[:, [3, 9]] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    data = [(x, (x[:, 0] > 0).long()) for x, _ in labelled((16, 4), 2)]
    small = prune(model, torch.zeros(1, 4), "taylor", target={"ratio": 14 / 16}, data=data)
    assert small.slimkit_pruning.kept["0.weight"][0] == [3, 9]


def test_own_loss_takes_the_place_of_cross_entropy():
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return model(batch).square().sum()

    model, inputs = make("mlp")
    data = [torch.randn(2, 8) for _ in range(5)]
    prune(model, inputs, "taylor", target=HALF, data=data, loss=loss, data_batches=3)
    assert [id(batch) for batch in seen] == [id(batch) for batch in data[:3]]


def test_taylor_without_labels_is_an_error():
    model, inputs = make("mlp")
    with pytest.raises(PruningError, match=r"\(inputs, labels\) to take a gradient; pass loss="):
        prune(model, inputs, "taylor", target=HALF, data=[torch.randn(2, 8)])


def test_taylor_takes_several_inputs_beside_the_labels():
    model, inputs = make("two_inputs")
    small = prune(model, inputs, "taylor", target=HALF, data=[(inputs, torch.tensor([0, 1]))])
    assert counted(small, inputs) <= 0.5 * counted(model, inputs)


def test_frozen_parameters_are_pruned_and_stay_frozen():
    model, inputs = make("mlp")
    model[0].requires_grad_(False)
    small = prune(model, inputs, "taylor", target=HALF, data=labelled((4, 8), 4))
    assert [p.requires_grad for p in small.parameters()] == [False] * 2 + [True] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error_that_names_the_tensor(value):
    model, inputs = make("chain")
    model[3].weight.data[0, 0, 0, 0] = value
    with pytest.raises(PruningError, match="3.weight holds NaN or infinity"):
        prune(model, inputs, target=HALF)


def test_statistics_that_are_not_a_number_are_an_error_that_names_the_tensor():
    model, inputs = make("chain")
    model[1].running_var[0] = float("nan")
    with pytest.raises(PruningError, match="1.running_var holds NaN"):
        prune(model, inputs, target=HALF)


def test_inputs_that_are_not_finite_are_an_error():
    model, inputs = make("mlp")
    with pytest.raises(PruningError, match="example_inputs hold NaN"):
        prune(model, inputs[0] / 0, target=HALF)


def test_grouped_convolution_keeps_its_groups_and_each_loses_as_much():
    model, inputs = make("grouped")
    small = prune(model, inputs, target={"ratio": 0.5}, protect_first=False)
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (4, 4, 2)


def test_second_engine_leaves_a_grouped_convolution_whole_with_a_reason():
    small = prune(grouped(), IMAGE, target={"flops": 0.7}, engine="torch-pruning")
    assert small.slimkit_pruning.frozen["2"] == "2 (Conv2d) cannot be cut"
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (8, 8, 2)


def test_depthwise_convolution_shrinks_with_its_channels():
    model, inputs = make("depthwise")
    layer = prune(model, inputs, target=HALF)[3]
    assert layer.groups == layer.in_channels == layer.out_channels < 8


def test_second_engine_leaves_layers_around_a_functional_call_whole_and_cuts_others():
    model = functional_call()
    small = prune(model, IMAGE, target={"flops": 0.8}, engine="torch-pruning")
    assert (small.a.out_channels, small.b.out_channels, small.c.out_channels < 16) == (8, 6, True)
    expected = silenced(model, small.slimkit_pruning.kept)(IMAGE)
    assert torch.allclose(small(IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_layer_with_a_weight_computed_in_its_forward_is_cut_to_the_target():
    class Standardized(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Standardized(16, 12), nn.Linear(12, 2))
    small = prune(model, torch.zeros(1, 8), target=HALF, protect=["0"])
    assert counted(small, (torch.zeros(1, 8),)) <= 0.5 * (8 * 16 + 16 * 12 + 12 * 2)


@pytest.mark.parametrize(
    ("engine", "layer", "reason"),
    [
        ("export", "0.parametrizations.weight", "the operation _weight_norm is not understood"),
        ("torch-pruning", "0", "0.weight is computed from other parameters"),
    ],
)
def test_layer_whose_weight_is_made_by_a_parametrization_stays_whole(engine, layer, reason):
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))
    model = nn.Sequential(normed, nn.Linear(16, 12), nn.Linear(12, 2))
    small = prune(model, torch.zeros(1, 8), target={"flops": 0.8}, engine=engine)
    assert small[0].weight.shape == (16, 8)
    assert small.slimkit_pruning.frozen[layer].startswith(reason)


def test_layer_whose_halves_are_read_apart_loses_the_same_positions_of_both():
    small = prune(chunked(), torch.randn(2, 8), target={"ratio": 0.5})
    first, second = torch.tensor(small.slimkit_pruning.kept["stem.weight"][0]).chunk(2)
    assert first.tolist() == (second - 4).tolist()
    assert small.a.in_features == small.b.in_features == 2


def test_criterion_may_be_an_object():
    class Last(Criterion):
        def score(self, layer):
            return torch.arange(1.0, len(layer.weight) + 1)[:, None]

    model, inputs = make("sigmoid_chain")
    small = prune(model, inputs, Last(), target={"ratio": 0.5})
    assert small.slimkit_pruning.kept["0.weight"][0] == [*range(8, 16)]


def test_misspelt_criterion_is_an_error_with_the_nearest_name():
    with pytest.raises(PluginError, match="no criterion is called 'tayler'; did you mean 'taylor'"):
        prune(mlp(), torch.zeros(1, 8), "tayler", target=HALF)


def test_data_gives_the_batch_norms_new_statistics():
    model = lived_in(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 2)))
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    small = prune(model, IMAGE, target=HALF, data=data)
    with torch.no_grad():
        means = torch.stack([small[0](x).mean((0, 2, 3)) for x in data]).mean(0)
    assert torch.allclose(small[1].running_mean, means, atol=1e-6)


def test_no_batches_for_batch_norm_leaves_its_statistics():
    model, inputs = make("chain")
    data = list(labelled((4, 3, 8, 8), 5))
    small = prune(model, inputs, target=HALF, data=data, batchnorm_batches=0)
    kept = small.slimkit_pruning.kept["1.running_mean"][0]
    assert torch.equal(small[1].running_mean, model[1].running_mean[kept])


def test_data_that_can_be_read_only_once_serves_gradients_and_batch_norm():
    model, inputs = make("chain")
    once = prune(model, inputs, "taylor", target=HALF, data=labelled((4, 3, 8, 8), 5))
    again = prune(model, inputs, "taylor", target=HALF, data=list(labelled((4, 3, 8, 8), 5)))
    assert torch.equal(once[1].running_mean, again[1].running_mean)


def test_example_inputs_that_are_no_tensor_are_an_error():
    with pytest.raises(Exception, match="example_inputs must be a tensor"):
        prune(mlp(), 3, target=HALF)


def test_training_mode_of_the_model_is_kept():
    model, inputs = make("chain")
    model.train()
    model[1].eval()
    small = prune(model, inputs, target=HALF)
    assert (small.training, small[0].training, small[1].training) == (True, True, False)


def test_report_prints_every_group_and_every_reason():
    model, inputs = make("residual")
    small = prune(model, inputs, target=HALF)
    printed = str(small.slimkit_pruning)
    assert re.search(r"^MACs +[\d,]+ -> +[\d,]+  \(4\d\.\d%\)$", printed, re.M)
    assert re.search(rf"^stem +8 -> +{small.stem.out_channels} channels  with ", printed, re.M)
    assert re.search(r"^head +left whole: its channels are the model's output$", printed, re.M)


def test_layers_in_a_list_inside_a_network_are_cut():
    def flow(net, x):
        for layer in net.layers:
            x = functional.relu(layer(x))
        return net.head(x)

    layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 12)])
    model = Net(flow, layers=layers, head=nn.Linear(12, 3))
    small = prune(model, torch.zeros(1, 8), target=HALF)
    assert small.layers[0].out_features < 12


def test_importance_is_that_of_the_criterion():
    class First(Criterion):
        """The first output channel of a layer has half of the importance, the next a quarter..."""

        def score(self, layer):
            return 0.5 ** torch.arange(1.0, len(layer.weight) + 1)[:, None]

    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 1, bias=False))
    with_one_output = prune(model, torch.ones(1, 4), First(), target={"importance": 0.6})
    # one half, one quarter ... of 0.996: two carry 0.75
    assert with_one_output.slimkit_pruning.kept["0.weight"][0] == [0, 1]


def test_ratios_and_target_share_the_model():
    model, inputs = make("residual")
    small = prune(model, inputs, target=HALF, ratios={"down": 0.5})
    assert (small.down.out_channels, small.stem.out_channels < 8) == (3, True)
    assert counted(small, inputs) <= 0.5 * counted(model, inputs)


def test_max_ratio_holds_the_target_back():
    model, inputs = make("mlp")
    small = prune(model, inputs, target={"ratio": 0.5}, max_ratio=[0.25, 0.5])
    assert (small[0].out_features, small[2].out_features) == (12, 6)


@pytest.mark.parametrize("ratios", [None, {}])
def test_neither_target_nor_ratios_is_an_error(ratios):
    model, inputs = make("mlp")
    with pytest.raises(PruningError, match="give a target, .* or ratios"):
        prune(model, inputs, ratios=ratios)


@pytest.mark.parametrize(
    "options",
    [{"ratios": {"0": 1}}, {"ranking": "x"}, {"max_ratio": 1}, {"target": {"size_mb": 9}}],
    ids=str,
)
def test_bad_options_are_an_error_and_leave_the_model_alone(options):
    model, inputs = make("mlp")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError):
        prune(model, inputs, **{"target": HALF, **options})
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_ratios_of_zero_alone_are_an_error():
    model, inputs = make("mlp")
    with pytest.raises(PruningError, match="nothing was pruned"):
        prune(model, inputs, ratios={"0": 0.0})


def stacked():
    return nn.Sequential(*(conv(a, b) for a, b in ((3, 8), (8, 8), (8, 8), (8, 2)))).eval()


FIRST = "the first layer is protected: all else is made of it (protect_first: false lets it go)"


@pytest.mark.parametrize("target", [{"flops": 0.7}, {"ratio": 0.5}, {"importance": 0.6}])
def test_the_first_layer_stays_whole_with_the_reason(target):
    small = prune(stacked(), IMAGE, target=target)
    assert small[0].out_channels == 8
    assert small.slimkit_pruning.frozen["0"] == FIRST
    assert "0" not in small.slimkit_pruning.groups


def test_the_first_layer_is_pruned_where_it_may():
    small = prune(stacked(), IMAGE, target={"ratio": 0.5}, protect_first=False)
    assert small[0].out_channels == 4


def test_the_first_layer_is_pruned_by_ratios():
    small = prune(stacked(), IMAGE, target={"ratio": 0.5}, ratios={"0": 0.25})
    assert small[0].out_channels == 6


def test_the_first_layer_is_pruned_where_the_target_cannot_be_reached_without_it():
    small = prune(stacked(), IMAGE, target={"flops": 0.1})
    assert small[0].out_channels < 8
    assert "0" in small.slimkit_pruning.groups


def test_a_first_layer_whose_channels_others_share_is_no_exception():
    model, inputs = make("residual")
    assert "stem" in prune(model, inputs, target={"ratio": 0.5}).slimkit_pruning.groups


def test_a_first_layer_that_is_one_of_two_is_no_exception():
    small = prune(nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 2)), IMAGE, target={"ratio": 0.5})
    assert small[0].out_channels == 4


def test_a_linear_layer_over_features_is_no_exception():
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    small = prune(nn.Sequential(*layers, nn.Linear(8, 2)), torch.zeros(1, 4), target={"ratio": 0.5})
    assert small[0].out_features == 4


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_is_pruned_without_compiling(whole):
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    model = stacked()
    if whole:
        model = torch.compile(model, backend=backend)
    else:
        model[1].compile(backend=backend)
    small = prune(model, IMAGE, target={"flops": 0.5})
    assert compiled == []
    before, after = small.slimkit_pruning.macs
    assert 0.4 < after / before <= 0.5
    assert small(IMAGE).shape == stacked()(IMAGE).shape
    assert compiled == []  # what comes out is plain
    assert isinstance(small, nn.Sequential)


def test_torchscript_is_refused():
    scripted = torch.jit.script(stacked())
    with pytest.raises(PruningError, match="is TorchScript, whose code and sizes are fixed"):
        prune(scripted, IMAGE, target={"flops": 0.5})


@dataclass
class Answer:
    y: torch.Tensor


@pytest.mark.parametrize("answer", [Answer, lambda y: {y}, lambda y: (y.sum(), Answer(y))])
def test_an_output_of_any_kind_keeps_its_channels(answer):
    model = Net(
        lambda net, x: answer(net.c(net.b(net.a(x)))),
        a=nn.Linear(8, 32),
        b=nn.Linear(32, 32),
        c=nn.Linear(32, 4),
    )
    small = prune(model, torch.randn(3, 8), target={"flops": 0.5})
    assert small.c.out_features == 4
    assert small.slimkit_pruning.frozen["c"] == "its channels are the model's output"


def test_a_forward_without_a_tensor_is_refused():
    model = Net(lambda net, x: setattr(net, "y", net.b(net.a(x))), a=nn.Linear(8, 8))
    model.b = nn.Linear(8, 4)
    with pytest.raises(PruningError, match="the forward returns no tensor, but NoneType"):
        prune(model, torch.randn(3, 8), target={"flops": 0.5})


def test_a_forward_that_writes_into_its_input_leaves_the_example_alone():
    model = Net(lambda net, x: net.b(net.a(x.sub_(0.5))), a=nn.Linear(8, 32), b=nn.Linear(32, 4))
    x = torch.randn(3, 8)
    before = x.clone()
    assert prune(model, x, target={"flops": 0.5}).a.out_features == 16
    assert torch.equal(x, before)


def test_a_forward_that_reaches_the_original_is_refused():
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    wrapped = Net(lambda _, x: model(x), net=model)
    before = {name: t.clone() for name, t in wrapped.state_dict().items()}
    with pytest.raises(PruningError, match=r"a copy of Net runs the original's net: a lambda"):
        prune(wrapped, torch.randn(3, 8), target={"flops": 0.5})
    assert all(torch.equal(before[name], t) for name, t in wrapped.state_dict().items())


def test_modules_that_share_a_dictionary_go_on_sharing_it():
    notes = {}
    writes = Net(lambda net, x: net.notes.update(h=net.a(x)), a=nn.Linear(8, 32))
    model = Net(lambda net, x: net.e(x) or net.o(net.notes["h"]), e=writes, o=nn.Linear(32, 4))
    writes.notes = model.notes = notes
    small = prune(model, torch.randn(3, 8), target={"flops": 0.5})
    assert small(torch.randn(3, 8)).shape == (3, 4)
    assert notes == {}


def test_what_cannot_be_copied_is_named():
    model = stacked()
    model.lock = threading.Lock()
    with pytest.raises(PruningError, match="Sequential cannot be copied: cannot pickle"):
        prune(model, IMAGE, target={"flops": 0.5})


def unused_branch():
    """A layer whose output nobody reads, as the last of WaveNet's residual ones."""

    def flow(net, x):
        x = functional.relu(net.a(x))
        net.dead(x)
        return net.b(x)

    layers = {"a": nn.Linear(8, 16), "dead": nn.Linear(16, 16), "b": nn.Linear(16, 4)}
    return Net(flow, **layers)


BATCHES = [(torch.randn(4, 8), torch.arange(4)) for _ in range(2)]


def test_a_layer_that_nobody_reads_is_no_obstacle_to_gradients():
    model = unused_branch()
    small = prune(model, BATCHES[0][0], "taylor", target=HALF, data=BATCHES, protect=["dead"])
    assert small.a.out_features < 16
    assert small.dead.in_features == small.a.out_features
    with pytest.raises(PruningError, match="the loss gave any layer of 'dead' none"):
        prune(model, BATCHES[0][0], "taylor", target=HALF, data=BATCHES)


def test_where_nothing_may_go_the_reasons_are_said_not_the_data():
    with pytest.raises(PruningError, match="its channels are the model's output"):
        prune(nn.Linear(8, 4), BATCHES[0][0], "taylor", target=HALF, data=BATCHES)


def test_a_forward_that_depends_on_data_is_one_error_and_nothing_else(capfd):
    def flow(net, x):
        return net.b(net.a(x)) if x.sum() > 0 else net.b(x)

    model = Net(flow, a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    with pytest.raises(PruningError, match="depends on the values of its data"):
        prune(model, torch.ones(2, 8), target=HALF)
    assert capfd.readouterr() == ("", "")


def test_a_buffer_that_divides_channels_is_cut_with_them():
    def flow(net, x):
        return net.b(functional.relu(net.a(x) / net.scale))

    model = Net(flow, a=nn.Linear(8, 32), b=nn.Linear(32, 4))
    model.register_buffer("scale", torch.rand(32) + 0.5)
    small = prune(model, BATCHES[0][0], target=HALF)
    kept = small.slimkit_pruning.kept["scale"][0]
    assert torch.equal(small.scale, model.scale[kept])
    expected = silenced(
        model, {k: v for k, v in small.slimkit_pruning.kept.items() if k != "scale"}
    )
    torch.testing.assert_close(small(BATCHES[0][0]), expected(BATCHES[0][0]))
