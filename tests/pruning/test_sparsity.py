"""Zero weights at once: which layers, which weights, and what the report says."""

import pytest
import torch
from nets import normal
from torch import nn

import slimkit
from slimkit.errors import PruningError
from slimkit.interfaces import Criterion


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def pruned(model=None, **options):
    return slimkit.prune(model or network(), normal(1, 3, 8, 8), **options)


def fractions(model) -> dict[str, float]:
    return {n: (p == 0).float().mean().item() for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "element", "target": {"ratio": 0.5}, "ranking": "local"},
        {"granularity": "block", "target": {"ratio": 0.5}, "ranking": "local"},
        {"granularity": "2:4"},
    ],
)
def test_the_first_and_depthwise_layers_stay_whole(options):
    small = pruned(**options)
    found = fractions(small)
    assert found == {"0.weight": 0, "2.weight": 0, "3.weight": 0.5, "7.weight": 0.5}
    report = small.slimkit_pruning
    assert report.weights == {"3.weight": (128, 64), "7.weight": (64, 32)}
    assert report.frozen["0"].startswith("the first layer is protected")
    assert report.frozen["2"].startswith("depthwise")
    assert "50.0% of 128 weights are zero" in str(report)


def test_the_rest_of_the_model_is_as_it_was():
    dense, small = network(), pruned(granularity="2:4")
    for name, tensor in small.state_dict().items():
        whole = dense.state_dict()[name]
        assert torch.equal(tensor, torch.where(tensor == 0, tensor, whole)), name


def test_the_first_layer_can_be_let_go():
    found = fractions(pruned(granularity="element", target={"ratio": 0.5}, protect_first=False))
    assert found["0.weight"] > 0


def test_the_largest_magnitudes_of_all_layers_stay():
    dense = network()
    small = pruned(granularity="element", target={"ratio": 0.75})
    pooled = torch.cat([dense[i].weight.abs().flatten() for i in (3, 7)])
    threshold = pooled.sort().values[int(0.75 * 192)]
    for i in (3, 7):
        expected = dense[i].weight * (dense[i].weight.abs() >= threshold)
        assert torch.equal(small[i].weight, expected)


def test_gradients_of_data_can_score_single_weights():
    data = [(normal(8, 3, 8, 8, seed=i), torch.arange(8) % 4) for i in range(2)]
    small = pruned(criterion="taylor", granularity="element", target={"ratio": 0.5}, data=data)
    reference = network().eval()
    scores = {}
    for x, y in data:
        reference.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        for i in (3, 7):
            w = reference[i].weight
            scores[i] = scores.get(i, 0) + (w.grad * w).square().detach() / 2
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort().values[96]
    for i, score in scores.items():
        assert torch.equal(small[i].weight != 0, score >= threshold)


def test_2_of_4_that_does_not_fit_is_one_error_that_names_the_layers():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(10, 2))
    with pytest.raises(PruningError, match=r"0 \(6\), 3 \(10\).*protect: \[0, 3\]"):
        slimkit.prune(model, torch.zeros(1, 6), granularity="2:4")
    small = slimkit.prune(model, torch.zeros(1, 6), granularity="2:4", protect=["0", "3"])
    assert fractions(small) == {"0.weight": 0, "1.weight": 0.5, "2.weight": 0.5, "3.weight": 0}


class Tied(nn.Module):
    """A language model's two ends: the table of words is the last layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        x = self.normed(self.body(self.words(x)))
        return self.head(self.attend(x, x, x)[0])


def test_weights_that_are_no_layers_own_stay_whole_with_a_reason():
    small = slimkit.prune(Tied(), torch.zeros(1, 3, dtype=torch.int64), granularity="2:4")
    report = small.slimkit_pruning
    assert set(report.weights) == {"body.weight", "attend.out_proj.weight"}
    assert report.frozen == {
        "head": "shares its weight with words",
        "normed": "its weight is computed of other parameters",
        "attend.in_proj_weight": "no weight of a convolution or linear layer",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "2:4", "target": {"ratio": 0.5}}, "leave the target out"),
        ({"granularity": "element", "target": {"flops": 0.5}}, "needs a ratio.*not {flops: 0.5}"),
        ({"granularity": "element"}, "target must name exactly one"),
        ({"granularity": "elemnt", "target": {"ratio": 0.5}}, "did you mean 'element'"),
        ({"granularity": "2:4", "round_to": 8, "ratios": {"3": 0.5}}, "^ratios, round_to: about"),
        ({"granularity": "2:4", "protect": ["linear"]}, "protect: no layer .* 'linear'"),
        ({"granularity": "2:4", "protect": ["*"]}, "nothing can be pruned: 0: protected by"),
        ({"granularity": "element", "target": {"ratio": 0.001}}, "nothing was pruned: 0.001 of"),
    ],
)
def test_what_cannot_be_done_is_said(options, message):
    with pytest.raises(PruningError, match=message):
        pruned(**options)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("bn-scale", "needs norm_scale.*not single weights"),
        ("fpgm", "FPGM scores channels, not single weights"),
    ],
)
def test_a_criterion_of_channels_is_refused(criterion, message):
    with pytest.raises(PruningError, match=message):
        pruned(criterion=criterion, granularity="2:4")


def test_inputs_of_data_can_score_two_of_four():
    data = [normal(8, 3, 8, 8)]
    small = pruned(criterion="wanda", granularity="2:4", data=data, batchnorm_batches=0)
    reference = network().eval()
    inputs = reference[:3](data[0])  # what the pointwise convolution reads
    score = reference[3].weight.abs() * inputs.square().sum((0, 2, 3)).sqrt()[None, :, None, None]
    fours = score.reshape(16, 2, 4)
    expected = fours >= fours.sort(2).values[:, :, 2:3]
    assert torch.equal(small[3].weight.reshape(16, 2, 4) != 0, expected)


def test_a_score_that_is_no_number_is_an_error():
    class Broken(Criterion):
        def score(self, layer):
            return layer.weight * torch.nan

    with pytest.raises(PruningError, match="Broken gave a score that is not a finite number"):
        pruned(criterion=Broken(), granularity="2:4")


def test_zeros_are_zero_in_a_saved_model(tmp_path):
    small = pruned(granularity="2:4")
    slimkit.save(small, tmp_path / "small")
    loaded = slimkit.load(tmp_path / "small", network)
    assert fractions(loaded) == fractions(small)
    assert loaded.slimkit_pruning.weights == small.slimkit_pruning.weights


def test_zeros_are_zero_in_the_exported_file(tmp_path):
    import onnx
    from onnx import numpy_helper

    small = pruned(granularity="2:4")
    slimkit.export(small, normal(1, 3, 8, 8), directory=tmp_path / "files")
    (path,) = (tmp_path / "files").rglob("*.onnx")
    arrays = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    zero = {a.shape: (a == 0).mean() for a in arrays if a.ndim > 1}
    assert sorted(zero.values()) == [0, 0, 0.5, 0.5]
