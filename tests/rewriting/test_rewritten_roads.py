"""A rewritten model is pruned, quantized, exported and loaded again like any other."""

import json

import onnx
import pytest
import torch
from rewritten_nets import Slices, alive, sixes
from torch import Tensor, nn
from torch.nn import functional

import slimkit
from slimkit.errors import ArtifactError

CHOSEN = ["focus-to-conv", "silu-to-hardswish", "fixed-pooling"]


class Camera(nn.Module):
    """A focus stem, functional SiLU, adaptive pooling: what all three rewrites look for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Slices()
        self.body = nn.Sequential(nn.Conv2d(6, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 16, 1))
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.body(self.stem(x)))
        return self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))


def build() -> nn.Module:
    torch.manual_seed(7)
    return alive(Camera())


@pytest.fixture(scope="module")
def x():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def fast(x):
    return slimkit.rewrite(build(), x, CHOSEN)


def operations(folder):
    (file,) = folder.rglob("*.onnx")
    return {node.op_type for node in onnx.load(file).graph.node}


def test_the_exported_file_has_the_new_operations(fast, x, tmp_path):
    before = slimkit.export(build(), x, "onnxruntime", directory=tmp_path / "before")
    after = slimkit.export(fast, x, "onnxruntime", directory=tmp_path / "after")
    old, new = operations(before.directory), operations(after.directory)
    assert {"Slice", "Concat", "Sigmoid"} <= old
    assert not new & {"Slice", "Concat", "Sigmoid"}
    assert "HardSwish" in new or "HardSigmoid" in new
    torch.testing.assert_close(after.run(x), fast(x).detach(), rtol=1e-3, atol=1e-4)


def test_ncnn_runs_the_rewritten_model(fast, x, tmp_path):
    artifact = slimkit.export(fast, x, "ncnn", directory=tmp_path / "out")
    torch.testing.assert_close(artifact.run(x), fast(x).detach(), rtol=5e-3, atol=5e-3)


def test_torch_export_writes_the_rewritten_model_down(fast, x):
    program = torch.export.export(fast, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), fast(x))


def test_a_rewritten_model_is_pruned_quantized_exported_and_loaded_again(fast, x, tmp_path):
    small = slimkit.prune(fast, x[:1], target={"ratio": 0.5})
    assert small.body[0].out_channels == 12
    assert small.stem.conv.weight.shape[1:] == (3, 6, 6)
    int8 = slimkit.quantize(small, [x], "onnxruntime")
    artifact = slimkit.export(int8, x, "onnxruntime", directory=tmp_path / "out")
    assert artifact.agreement >= 0.99
    again = slimkit.load(tmp_path / "out", model=build)
    assert isinstance(again.model.body[1], nn.Hardswish)
    assert torch.equal(again(x), int8.eval()(x))
    assert [one.name for one in again.model.slimkit_rewriting.done] == CHOSEN
    assert "forward" not in vars(build())


def test_a_saved_model_is_rewritten_and_cut_again(fast, x, tmp_path):
    small = slimkit.prune(fast, x[:1], target={"flops": 0.6})
    again = slimkit.load(slimkit.save(small, tmp_path / "small"), model=build)
    assert torch.equal(again(x), small(x))
    again.train()(x).sum().backward()
    assert again.stem.conv.weight.grad.shape == small.stem.conv.weight.shape


def test_padded_channels_come_back(x, tmp_path):
    net = alive(sixes())
    wide = slimkit.rewrite(net, x[..., :8, :8], "pad-channels")
    again = slimkit.load(slimkit.save(wide, tmp_path / "wide"), model=lambda: alive(sixes()))
    assert again[0].out_channels == 8
    assert torch.equal(again(x[..., :8, :8]), wide(x[..., :8, :8]))


def test_the_manifest_tells_what_was_done(fast, tmp_path):
    content = json.loads((slimkit.save(fast, tmp_path / "fast") / "slimkit.json").read_text())
    done = {one["name"]: one for one in content["rewriting"]}
    assert list(done) == CHOSEN
    assert done["focus-to-conv"]["cost"] == "exact, verified"
    assert done["silu-to-hardswish"]["places"] == 3
    assert done["silu-to-hardswish"]["sqnr_db"][0] > 3


def test_a_model_that_was_built_differently_is_refused(fast, tmp_path):
    folder = slimkit.save(fast, tmp_path / "fast")
    with pytest.raises(ArtifactError, match="no module 'stem"):
        slimkit.load(folder, model=sixes)
