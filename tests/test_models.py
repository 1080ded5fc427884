"""The pretrained networks of `benchmarks/models` compute what is published, and lose half of it."""

import copy
import os
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import slimkit
from benchmarks.models import (
    fastestdet,
    mobilenet_v1,
    resnet8,
    silero_vad,
    squeezenet,
    sst2_transformer,
    yolox_nano,
)

ROOT = Path(os.environ.get("SLIMKIT_DATA") or Path(__file__).parents[2] / "shared/data").resolve()

pytestmark = pytest.mark.skipif(
    not (ROOT / "weights").is_dir(),
    reason=f"needs the pretrained weights in {ROOT} (set SLIMKIT_DATA)",
)


@dataclass(frozen=True)
class Network:
    """How a network is built, and what it takes and gave: the name of a file in reference/."""

    reference: str
    pretrained: Callable[[str], nn.Module]
    prepare: Callable[[torch.Tensor], torch.Tensor] = lambda ids: ids

    def build(self):
        return self.pretrained(str(ROOT)).eval()

    def inputs(self):
        with np.load(ROOT / f"reference/{self.reference}.npz") as reference:
            return self.prepare(torch.from_numpy(reference["input"]))

    def output(self):
        with np.load(ROOT / f"reference/{self.reference}.npz") as reference:
            return torch.from_numpy(reference["output"])

    def example(self):
        return (self.inputs()[:1],)


class Vad(Network):
    def example(self):
        return (silero_vad.frames(recording(100))[60:61], torch.randn(1, 128), torch.randn(1, 128))


NETWORKS = [
    Network("cifar10_resnet8", resnet8.pretrained, resnet8.prepare),
    Network("cifar10_resnet8_wide", resnet8.pretrained_wide, resnet8.prepare),
    Network("imagenet_mobilenet_v1_025", mobilenet_v1.pretrained, mobilenet_v1.prepare),
    Network("imagenet_squeezenet_1_1", squeezenet.pretrained, squeezenet.prepare),
    Network("coco_yolox_nano", yolox_nano.pretrained, yolox_nano.prepare),
    Network("coco_fastestdet", fastestdet.pretrained, fastestdet.prepare),
    Network("sst2_transformer_small", sst2_transformer.pretrained),
]
VAD = Vad("silero_vad_16k", silero_vad.pretrained)


def recording(frames):
    """The first frames of the test recording, samples in -1..1."""
    with wave.open(str(ROOT / "vad/test.wav")) as file:
        samples = np.frombuffer(file.readframes(frames * silero_vad.NEW), dtype=np.int16)
    return torch.from_numpy(samples.astype(np.float32)) / 32768


def outputs(model, inputs):
    with torch.no_grad():
        return tree_leaves(model(*inputs))


def macs(model, inputs):
    with FlopCounterMode(display=False) as counter:
        outputs(model, inputs)
    return counter.get_total_flops() // 2


def assert_near(found, expected, tolerance):
    """Differences are at most `tolerance` of the largest number that is expected."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def silenced(model, kept):
    """The model with all weights set to zero that are not kept, normalising what is kept."""
    zeroed = copy.deepcopy(model)
    state = zeroed.state_dict(keep_vars=True)
    for name, dims in kept.items():
        if name.endswith("running_var"):
            continue
        for dim, positions in dims.items():
            gone = [i for i in range(state[name].shape[dim]) if i not in set(positions)]
            state[name].data.index_fill_(dim, torch.tensor(gone), 0.0)
    for name, module in zeroed.named_modules():
        if isinstance(module, nn.LayerNorm) and f"{name}.weight" in kept:
            module.register_forward_hook(normalising(torch.tensor(kept[f"{name}.weight"][0])))
    return zeroed


def normalising(positions):
    def over_positions(layer, inputs, output):
        some = functional.layer_norm(inputs[0][..., positions], [len(positions)], eps=layer.eps)
        some = some * layer.weight[positions] + layer.bias[positions]
        return torch.zeros_like(output).index_copy(-1, positions, some)

    return over_positions


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.reference)
def test_a_network_gives_the_reference_outputs(network):
    assert_near(outputs(network.build(), (network.inputs(),)), [network.output()], 1e-3)


def test_the_voice_detector_gives_the_reference_probabilities():
    found = silero_vad.speech(VAD.build(), recording(200))
    expected = torch.from_numpy(np.load(ROOT / "vad/reference.npz")["prob"])[:200]
    assert expected.max() > 0.9
    assert expected.min() < 0.1
    assert_near([found], [expected], 1e-3)


@pytest.fixture(scope="module", params=[*NETWORKS, VAD], ids=lambda network: network.reference)
def cut(request):
    """A network, its example inputs, the model and what is left of it."""
    torch.manual_seed(0)
    model, inputs = request.param.build(), request.param.example()
    return request.param, inputs, model, slimkit.prune(model, inputs, target={"flops": 0.5})


def test_half_of_the_multiply_accumulates_are_left(cut):
    _, inputs, model, small = cut
    assert macs(small, inputs) / macs(model, inputs) == pytest.approx(0.5, abs=0.05)


def test_the_outputs_keep_their_shapes(cut):
    _, inputs, model, small = cut
    shapes = [[y.shape for y in outputs(m, inputs)] for m in (small, model)]
    assert shapes[0] == shapes[1]


def test_what_is_left_computes_what_zeroing_the_rest_does(cut):
    _, inputs, model, small = cut
    found = outputs(small, inputs)
    assert_near(found, outputs(silenced(model, small.slimkit_pruning.kept), inputs), 1e-4)
    assert not torch.allclose(found[0], outputs(model, inputs)[0], atol=1e-3)


def test_a_saved_network_is_loaded_with_the_function_that_builds_it(cut, tmp_path):
    network, inputs, _, small = cut
    slimkit.save(small, tmp_path / "small")
    again = slimkit.load(tmp_path / "small", model=network.build)
    for a, b in zip(outputs(again, inputs), outputs(small, inputs), strict=True):
        assert torch.equal(a, b)
