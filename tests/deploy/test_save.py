"""A compressed model is saved as weights and a manifest and comes back equal to the last bit."""

import json

import pytest
import torch
from models import PRUNABLE, make
from nets import simulated
from safetensors.torch import load_file

import slimkit
from slimkit.errors import ArtifactError


@pytest.mark.parametrize("name", PRUNABLE)
def test_a_pruned_model_comes_back_with_its_structure_and_numbers(name, tmp_path):
    model, inputs = make(name)
    small = slimkit.prune(model, inputs, target={"flops": 0.5})
    folder = slimkit.save(small, tmp_path / "small")
    again = slimkit.load(folder, model=lambda: make(name, seed=1)[0])
    assert torch.equal(again(*inputs), small(*inputs))
    assert again.slimkit_pruning == small.slimkit_pruning


def test_the_weights_file_is_the_plain_state_dict_of_the_small_model(tmp_path):
    model, inputs = make("chain")
    small = slimkit.prune(model, inputs, target={"flops": 0.5})
    tensors = load_file(slimkit.save(small, tmp_path / "small") / "weights.safetensors")
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    small.load_state_dict(plain, strict=True)


def test_a_model_pruned_twice_loads_into_the_first_original(tmp_path):
    model, inputs = make("residual")
    once = slimkit.prune(model, inputs, target={"flops": 0.7})
    twice = slimkit.prune(once, inputs, target={"flops": 0.7})
    folder = slimkit.save(twice, tmp_path / "small")
    assert torch.equal(slimkit.load(folder, model=make("residual")[0])(*inputs), twice(*inputs))


def test_a_quantized_model_comes_back_with_its_ranges(tmp_path):
    model, inputs = make("chain")
    small = slimkit.prune(model, inputs, target={"flops": 0.5})
    int8 = simulated(small, [inputs[0]])
    int8.backend = "ncnn"
    folder = slimkit.save(int8, tmp_path / "int8")
    assert torch.equal(slimkit.load(folder, model=make("chain")[0])(*inputs), int8(*inputs))


def test_the_function_that_builds_the_model_is_found_by_its_path(tmp_path):
    from slimkit.demo.digits import resnet

    image = torch.randn(1, 1, 8, 8)
    small = slimkit.prune(resnet().eval(), image, target={"flops": 0.5})
    folder = slimkit.save(small, tmp_path / "small", built_by="slimkit.demo.digits:resnet")
    assert torch.equal(slimkit.load(folder)(image), small(image))


def test_another_model_is_refused_with_the_name_of_the_first_misfit(tmp_path):
    model, inputs = make("chain")
    folder = slimkit.save(slimkit.prune(model, inputs, target={"flops": 0.5}), tmp_path / "small")
    with pytest.raises(ArtifactError, match=r"no tensor '\d.weight'|has \d+ channels|do not fit"):
        slimkit.load(folder, model=make("mlp")[0])


def test_a_changed_file_is_refused(tmp_path):
    model, inputs = make("chain")
    folder = slimkit.save(slimkit.prune(model, inputs, target={"flops": 0.5}), tmp_path / "small")
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="was changed after the export"):
        slimkit.load(folder, model=make("chain")[0])


def test_what_slimkit_did_not_write_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="will not replace"):
        slimkit.save(make("chain")[0], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_path_that_is_none_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ArtifactError, match="'package.module:name', not 'resnet'"):
        slimkit.save(make("chain")[0], tmp_path / "small", built_by="resnet")
    assert not (tmp_path / "small").exists()


def test_the_manifest_lists_kept_positions_and_reasons(tmp_path):
    model, inputs = make("chain")
    small = slimkit.prune(model, inputs, target={"flops": 0.5})
    manifest = json.loads((slimkit.save(small, tmp_path / "s") / "slimkit.json").read_text())
    assert manifest["pruning"]["frozen"] == {"7": "its channels are the model's output"}
    kept = {int(d): p for d, p in manifest["pruning"]["kept"]["3.weight"].items()}
    assert kept == small.slimkit_pruning.kept["3.weight"]
