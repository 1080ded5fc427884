"""The made-up NPU of slimkit-example on the whole road: pruned, quantized, exported, run."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import slimkit
from slimkit.deploy.agreement import compare
from slimkit.errors import ExportError
from slimkit.quantization.exact import exact
from slimkit.quantization.finished import finish
from slimkit.testing.networks import made


class Residual(nn.Module):
    """128 channels in a stream and 96 in its branch, with a batch-norm behind each layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128)
        self.down, self.down_norm = nn.Conv2d(128, 96, 1, bias=False), nn.BatchNorm2d(96)
        self.up, self.up_norm = nn.Conv2d(96, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.stem_norm(self.stem(x))), 2)
        y = self.up_norm(self.up(functional.relu(self.down_norm(self.down(x)))))
        return self.head(functional.relu(x + y).mean((2, 3)))


@pytest.fixture
def npu(install):
    install("slimkit-example", {}, "[slimkit]\nexample = slimkit_example\n")
    from slimkit_example.npu import MadeUpNpu

    return MadeUpNpu()


def pruned(backend=()):
    torch.manual_seed(0)
    model = Residual().eval()
    for norm in (model.stem_norm, model.down_norm, model.up_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.running_var.uniform_(0.5, 1.5)
    small = slimkit.prune(model, torch.zeros(1, 3, 16, 16), target={"ratio": 0.5}, backend=backend)
    return small, [layer.out_channels for layer in (small.stem, small.down, small.up)]


def images(seed=0):
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_channels_are_pruned_to_multiples_of_32_and_the_file_agrees(npu, tmp_path):
    assert pruned()[1] == [64, 48, 64]
    model, widths = pruned("made-up-npu")
    assert widths == [64, 64, 64]
    small = slimkit.quantize(model, [images()], backend="made-up-npu")
    artifact = slimkit.export(
        small, images()[:1], "made-up-npu", directory=tmp_path / "out", data=[images(1)]
    )
    assert artifact.agreement >= 0.995
    assert min(artifact.row.agreement.sqnr_db) >= 35
    assert artifact.row.operators["conv2d int8"] == 3
    assert artifact.row.operators["add int8"] == 1
    assert "conv2d host" not in artifact.row.operators
    again = slimkit.load(tmp_path / "out", Residual())
    with torch.no_grad():
        assert torch.equal(again(images(2)), small.eval()(images(2)))


def test_the_file_computes_what_the_integer_simulation_does_to_the_last_bit(npu, tmp_path):
    for network in ("convolutional", "residual"):
        model, x = made(network, 4)
        small = slimkit.quantize(model, [x], backend=npu).eval()
        directory = tmp_path / network
        directory.mkdir()
        npu.compile(finish(small, (x[:1],)), directory)
        run = npu.load(directory)
        with torch.no_grad():
            wanted = exact(small, (x[:1],))
            for sample in x.split(1):
                torch.testing.assert_close(run(sample)[0], wanted(sample), rtol=1e-6, atol=1e-6)


def test_layers_that_the_npu_lacks_run_on_the_host_in_float(npu, tmp_path):
    model, x = made("attention", 4)
    npu.compile(finish(model, (x[:1],)), tmp_path)
    found = npu.load(tmp_path)(x[:1])
    with torch.no_grad():
        assert min(compare([model(x[:1])], found).sqnr_db) > 100
    assert not any(name.endswith("int8") for name in npu.operators(tmp_path))


def test_a_model_that_was_quantized_for_something_else_is_refused_by_name(npu, tmp_path):
    model, x = made("residual", 4)
    deployable = finish(slimkit.quantize(model, [x], backend="onnxruntime"), (x[:1],))
    assert "is no power of two; quantize for this backend" in npu.check(deployable)[0]
    with pytest.raises(ExportError, match="no power of two"):
        npu.compile(deployable, tmp_path)
