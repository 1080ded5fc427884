"""A file runs on batches of samples, or says what is wrong with them."""

import pytest
import torch
from nets import normal
from torch import nn

import slimkit
from slimkit.builtin.backends.onnxruntime import OnnxRuntime
from slimkit.deploy.deployed import refuse_other
from slimkit.errors import ExportError
from slimkit.quantization.finished import finish


class Map(nn.Module):
    """The most likely of ten classes, of each pixel, and how likely it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 10, 1)

    def forward(self, x):
        scores = self.layer(x)
        return scores.argmax(1), scores.amax(1)


def test_a_tie_that_falls_the_other_way_is_no_other_model():
    torch.manual_seed(0)
    deployable = finish(Map().eval(), (normal(1, 3, 64, 64),))
    module = deployable.program.module(check_guards=False)
    with torch.no_grad():
        classes, scores = module(*deployable.example_inputs)
    flipped, worse = classes.clone(), scores * 1.01
    flipped[0, 5, 5] = 9 - flipped[0, 5, 5]
    refuse_other(OnnxRuntime(), deployable, lambda *_: [flipped, scores])
    with pytest.raises(ExportError, match="its output 0 has"):
        refuse_other(OnnxRuntime(), deployable, lambda *_: [classes.flip(1), scores])
    with pytest.raises(ExportError, match="its output 1 has 40 dB"):
        refuse_other(OnnxRuntime(), deployable, lambda *_: [classes, worse])


BACKENDS = ("torch", "onnxruntime", "ncnn")


class Sum(nn.Module):
    """Reads one of its inputs, or both, or one and a number."""

    def __init__(self, reads):
        super().__init__()
        self.layer, self.reads = nn.Linear(8, 4), reads

    def forward(self, x, y):
        y = {"one": 0, "both": y.sum(-1, keepdim=True) if y.dim() else y, "number": y}[self.reads]
        return {"sum": self.layer(x) + y}


def exported(reads, y, backend, folder):
    torch.manual_seed(0)
    net = Sum(reads).eval()
    return net, slimkit.export(net, (normal(4, 8), y), backend, directory=folder / "artifact")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reads", ["one", "both"])
def test_every_input_is_taken_sample_by_sample(backend, reads, tmp_path):
    net, artifact = exported(reads, normal(4, 3, seed=1), backend, tmp_path)
    x, y = normal(5, 8, seed=2), normal(5, 3, seed=3)
    torch.testing.assert_close(artifact.run(x, y), net(x, y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_number_beside_the_samples_is_the_same_for_all(backend, tmp_path):
    net, artifact = exported("number", torch.tensor(2.0), backend, tmp_path)
    x, y = normal(5, 8, seed=2), torch.tensor(3.0)
    torch.testing.assert_close(artifact.run(x, y), net(x, y), rtol=0, atol=1e-5)
    graph = slimkit.load(tmp_path / "artifact")
    torch.testing.assert_close(graph(x, y), net(x, y), rtol=0, atol=1e-5)


def test_a_number_is_more_than_ncnn_can_take(tmp_path):
    with pytest.raises(ExportError, match="without a dimension, such as"):
        exported("number", torch.tensor(2.0), "ncnn", tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_batch_is_one_error(backend, tmp_path):
    _, artifact = exported("both", normal(4, 3), backend, tmp_path)
    x, y = normal(2, 8), normal(2, 3)
    for inputs, says in {
        (): "no sample",
        (x[:0], y[:0]): "no sample",
        (x, y[:1]): "the inputs hold 1 and 2 samples",
        (x,): "takes 2 inputs, 1 were given",
        (x, y, y): "takes 2 inputs, 3 were given",
        (x[:, :7], y): "does not run on these inputs",
    }.items():
        with pytest.raises(ExportError, match=says):
            artifact.run(*inputs)
