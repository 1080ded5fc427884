"""The files of the backend, their arithmetic, and how they run without TensorRT."""

import logging
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from nets import normal
from onnx import numpy_helper
from slimkit_tensorrt import backend, engine
from slimkit_tensorrt.backend import TensorRT
from slimkit_tensorrt.rules import rules
from torch import nn
from torch.nn import functional

import slimkit
from slimkit.deploy.agreement import compare
from slimkit.errors import ExportError, UnavailableError
from slimkit.quantization.finished import finish
from slimkit.testing.networks import made


class Mixed(nn.Module):
    """A transposed convolution, a clipped activation, a residual sum, and matrices in 3-D."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Linear(16, 10)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(x + self.b(functional.relu6(self.a(x))))
        return self.head(functional.relu(self.up(x)).flatten(2).mT).mean(1)


def quantized(model, x, **options):
    return slimkit.quantize(model.eval(), [x], TensorRT(), **options).eval()


def file_of(model, x, folder, **options):
    TensorRT(**options).compile(finish(model, (x[:1],)), folder)
    return onnx.load(folder / "model.onnx")


@torch.no_grad()
def difference(model, x, folder):
    """Worst dB over the samples between model and file."""
    run = TensorRT().load(folder)
    found = torch.cat([run(one)[0] for one in x.split(1)])
    return compare([model(x)], [found])


def test_the_file_follows_the_rules_and_agrees_with_the_simulation(tmp_path):
    x = normal(64, 3, 16, 16)
    model = quantized(Mixed(), x)
    file = file_of(model, x, tmp_path)
    assert rules(file) == []
    agreement = difference(model, normal(256, 3, 16, 16, seed=1), tmp_path)
    assert agreement.share >= 0.995
    assert min(agreement.sqnr_db) >= 35


def test_every_layer_is_int8_with_zero_points_of_zero_and_scales_of_output_channels(tmp_path):
    x = normal(4, 3, 16, 16)
    file = file_of(quantized(Mixed(), x), x, tmp_path)
    tensors = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
    made_by = {name: n for n in file.graph.node for name in n.output}
    shapes = {}
    for layer in file.graph.node:
        if layer.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            weight = made_by[layer.input[1]]
            axis = {a.name: a.i for a in weight.attribute}["axis"]
            assert tensors[weight.input[0]].dtype == np.int8
            assert made_by[layer.input[0]].op_type == "DequantizeLinear"
            shapes.setdefault(layer.op_type, []).append((axis, tensors[weight.input[1]].size))
    assert shapes == {
        "Conv": [(0, 32)] * 3,
        "ConvTranspose": [(1, 16)],
        "MatMul": [(1, 10)],
    }
    zeros = [tensors[n.input[2]] for n in file.graph.node if n.op_type.endswith("tizeLinear")]
    assert {z.dtype for z in zeros} == {np.dtype(np.int8)}
    assert not any(z.any() for z in zeros)
    (total,) = [n for n in file.graph.node if n.op_type == "Add" and n.input[1] not in tensors]
    assert all(made_by[name].op_type == "DequantizeLinear" for name in total.input)


def test_a_channel_that_batch_norm_all_but_silences_keeps_its_bias(tmp_path):
    model = Mixed()  # a bias of 0.5 is 10^10 steps of such weights' products
    model.norm.weight.data[::2] = 1e-8
    model.norm.bias.data[:] = 0.5
    x = normal(64, 3, 16, 16)
    model = quantized(model, x)
    assert rules(file_of(model, x, tmp_path)) == []
    assert min(difference(model, x[:16], tmp_path).sqnr_db) > 60


def test_a_transposed_convolution_in_groups_has_its_scales_by_group(tmp_path):
    body = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
    x = normal(64, 3, 8, 8)
    model = quantized(nn.Sequential(*body), x)
    file_of(model, x, tmp_path)
    assert min(difference(model, x[:8], tmp_path).sqnr_db) > 40


def test_one_convolution_is_integer_arithmetic(tmp_path):
    """Against numpy: round, sum in int64, scale, add the float bias."""
    layer, x = nn.Conv2d(3, 8, 3), normal(8, 3, 9, 9)
    file = file_of(quantized(layer, x, activations="minmax"), x, tmp_path)
    tensors = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
    q, conv = (
        next(n for n in file.graph.node if n.op_type == t) for t in ("QuantizeLinear", "Conv")
    )
    dw = next(n for n in file.graph.node if conv.input[1] in n.output)
    step, w, w_step = tensors[q.input[1]], tensors[dw.input[0]], tensors[dw.input[1]]
    image = 3 * x[:1].numpy()  # two thirds of the range are clipped, at -128 and at 127
    integers = np.clip(np.rint(image / step), -128, 127).astype(np.int64)
    assert integers.min() == -128
    windows = np.lib.stride_tricks.sliding_window_view(integers, (3, 3), (2, 3))
    sums = np.einsum("ncyxij,ocij->noyx", windows, w.astype(np.int64))
    scale = (step * w_step).reshape(1, -1, 1, 1)
    expected = sums * scale + tensors[conv.input[2]].reshape(1, -1, 1, 1)
    (found,) = TensorRT().load(tmp_path)(torch.from_numpy(image))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_the_simulation_clips_where_int8_does(tmp_path):
    layer, x = nn.Conv2d(3, 8, 1, bias=False), normal(8, 3, 9, 9)
    model = quantized(layer, x, activations="minmax")
    file_of(model, x, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(TensorRT().load(tmp_path)(9 * x[:1])[0], model(9 * x[:1]))


def test_chosen_layers_stay_in_float_or_compute_in_half(tmp_path):
    x = normal(32, 3, 16, 16)
    model = quantized(Mixed(), x, keep_float=["a", "head"])
    for precision in ("fp32", "fp16"):
        folder = tmp_path / precision
        folder.mkdir()
        file = file_of(model, x, folder, precision=precision)
        assert rules(file) == []
        tensors = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
        kinds = [
            tensors[n.input[1]].dtype
            for n in file.graph.node
            if n.op_type in ("Conv", "MatMul") and n.input[1] in tensors
        ]
        assert kinds == [np.dtype(np.float16 if precision == "fp16" else np.float32)] * 2
        assert min(difference(model, x, folder).sqnr_db) >= 35


def test_a_float_model_in_half_is_near_and_not_equal(tmp_path):
    model, x = made("convolutional", 4)
    file_of(model, x, tmp_path, precision="fp16")
    assert 40 < min(difference(model, x, tmp_path).sqnr_db) < 90


def test_it_says_once_that_onnx_runtime_runs_the_file(tmp_path, caplog):
    backend._warn_once.cache_clear()
    model, x = made("convolutional", 4)
    file_of(model, x, tmp_path)
    with caplog.at_level(logging.WARNING, "slimkit_tensorrt"):
        for _ in range(2):
            TensorRT(runtime="onnxruntime").load(tmp_path)
    (record,) = [r for r in caplog.records if r.name == "slimkit_tensorrt"]
    assert "runs in ONNX Runtime on the CPU" in record.getMessage()


def test_tensorrt_that_is_asked_for_and_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(engine, "reason_against", lambda: "torch sees no NVIDIA GPU")
    with pytest.raises(UnavailableError, match="torch sees no NVIDIA GPU; auto takes ONNX"):
        TensorRT(runtime="tensorrt").load(None)


def test_a_missing_file_and_wrong_inputs_are_named(tmp_path):
    with pytest.raises(ExportError, match="missing: export again"):
        TensorRT(runtime="onnxruntime").load(tmp_path)
    model, x = made("convolutional", 4)
    file_of(model, x, tmp_path)
    run = TensorRT(runtime="onnxruntime").load(tmp_path)
    with pytest.raises(ExportError, match="takes 1 inputs, 2 were given"):
        run(x[:1], x[:1])
    with pytest.raises(ExportError, match="does not run on these inputs"):
        run(x[:1, :2])
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="cannot load"):
        TensorRT(runtime="onnxruntime").load(tmp_path)


class StandIn:
    """As much of the package as `engine.build` calls; NVIDIA's is not here."""

    def __init__(self, parses):
        self.calls = []
        self.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda _, level: None})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.parses = parses

    def Builder(self, logger):  # noqa: N802  (NVIDIA's name)
        network = lambda flags: self.calls.append(("network", flags))  # noqa: E731
        return SimpleNamespace(
            create_network=network,
            create_builder_config=lambda: "config",
            build_serialized_network=lambda network, config: b"plan",
        )

    def OnnxParser(self, network, logger):  # noqa: N802
        return SimpleNamespace(
            parse=lambda file: self.calls.append(("parse", file)) or self.parses,
            num_errors=1,
            get_error=lambda number: "node 3 (Sort): no",
        )


def test_an_engine_is_built_of_a_strongly_typed_network(monkeypatch):
    package = StandIn(parses=True)
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    assert engine.build(b"file") == b"plan"
    assert package.calls == [("network", 2), ("parse", b"file")]


def test_what_the_parser_says_is_passed_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", StandIn(parses=False))
    with pytest.raises(ExportError, match=r"parser refuses the file: node 3 \(Sort\): no"):
        engine.build(b"file")


def test_layers_that_only_tensorrt_takes_for_integers_count(tmp_path):
    """Where nothing is rounded behind a layer, ONNX Runtime computes it in float."""
    x = normal(8, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    int8 = slimkit.quantize(net, [x], "tensorrt", activations="minmax")
    artifact = slimkit.export(int8, x, "tensorrt", directory=tmp_path / "int8")
    assert artifact.row.operators["int8 layers by TensorRT's rules"] == 2
    assert artifact.row.agreement.sqnr_db[0] > 45  # a tie may fall either way
    plain = slimkit.export(net, x, "tensorrt", directory=tmp_path / "float")
    assert not [name for name in plain.row.operators if "int8" in name]
