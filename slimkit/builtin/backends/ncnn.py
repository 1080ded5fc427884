"""ncnn: a .param and a .bin file for phones and small boards, in float or int8."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from slimkit.builtin.backends.ncnn_model import Rounding, read_param, to_int8, write_param
from slimkit.errors import ExportError
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme

PARAM, BIN, SHAPES = "model.ncnn.param", "model.ncnn.bin", "shapes.json"


class Marker(nn.Module):
    """Survives pnnx as a layer of its own and so tells which layer's input is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """Anything that is not the identity, which pnnx would remove."""
        return x + 1.0


MARKER = f"{Marker.__module__}.{Marker.__qualname__}"


class Ncnn(Backend):
    """Files for ncnn, in float by pnnx and in int8 by slimkit, exact under ncnn's default options.

    The input of each convolution and linear layer is rounded to symmetric int8 per tensor, weights
    per output channel; everything between is float. ncnn has no batch dimension: inputs are
    (1, ...).
    """

    scheme = Scheme(
        activations=Grid(bits=8),
        weights=Grid(bits=8, per_channel=True),
        operations=frozenset({"conv2d", "linear"}),
    )

    def check(self, deployable: Deployable) -> list[str]:
        """What pnnx or ncnn says against this program (it is compiled on trial)."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.compile(deployable, Path(folder))
            except ExportError as error:
                return [str(error)]
        return []

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.ncnn.param``, ``model.ncnn.bin`` and the output shapes."""
        ncnn = _package("ncnn")
        batches = {t.shape[0] if t.dim() else 0 for t in deployable.example_inputs}
        if batches != {1}:
            raise ExportError(
                f"ncnn has no batch dimension, but the inputs have batches of {sorted(batches)}: "
                "export with example inputs of batch size 1"
            )
        module, roundings, shapes = _with_markers(deployable)
        param, weights = _run_pnnx(module, deployable.example_inputs)
        layers, weights = to_int8(read_param(param), weights, roundings, MARKER)
        unknown = sorted({x.type for x in layers if ncnn.layer_to_index(x.type) < 0})
        if unknown:
            raise ExportError(
                f"ncnn has no layer for {', '.join(unknown)} (pnnx left it as it was): replace "
                "that operation in the model, or cut it off and compute it outside"
            )
        (directory / PARAM).write_text(write_param(layers))
        (directory / BIN).write_bytes(weights)
        (directory / SHAPES).write_text(json.dumps({"outputs": shapes}) + "\n")

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Load with float32 arithmetic for the layers that are float, on `threads` threads."""
        ncnn = _package("ncnn")
        net = ncnn.Net()
        net.opt.num_threads = threads
        for name in dir(net.opt):
            if name.startswith(("use_fp16_", "use_bf16_")):
                setattr(net.opt, name, False)
        for name in (PARAM, BIN, SHAPES):
            if not (directory / name).exists():
                raise ExportError(f"{directory / name} is missing: export again")
        shapes = json.loads((directory / SHAPES).read_text())["outputs"]
        with _captured() as said:
            failed = net.load_param(str(directory / PARAM)) or net.load_model(str(directory / BIN))
        if failed:
            raise ExportError(f"ncnn cannot load {directory}: {_last_line(said)}")
        inputs = sorted(net.input_names(), key=_number)
        outputs = sorted(net.output_names(), key=_number)

        def run(*tensors: Tensor) -> list[Tensor]:
            if len(tensors) != len(inputs):
                raise ExportError(f"{PARAM} takes {len(inputs)} inputs, {len(tensors)} were given")
            arrays = [_array(tensor) for tensor in tensors]
            mats = [ncnn.Mat(array) for array in arrays]  # must live until all is extracted
            extractor = net.create_extractor()
            for name, mat in zip(inputs, mats, strict=True):
                extractor.input(name, mat)
            found = []
            for name, shape in zip(outputs, shapes, strict=True):
                code, mat = extractor.extract(name)
                if code != 0:
                    raise ExportError(f"ncnn failed with code {code} to compute {name} of {PARAM}")
                found.append(torch.from_numpy(np.array(mat)).reshape(shape))
            return found

        return run

    def operators(self, directory: Path) -> dict[str, int]:
        """Layer types; those that compute on integers have ``int8`` behind their name."""
        layers = read_param((directory / PARAM).read_text())
        names = [f"{x.type} int8" if x.int8 else x.type for x in layers if x.type != "Input"]
        return dict(sorted(Counter(names).items()))


def _with_markers(deployable: Deployable) -> tuple[nn.Module, list[Rounding], list[list[int]]]:
    """The program in float with a marker in front of each integer operation."""
    # registers torch.ops.quantized_decomposed
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = deployable.program.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise AssertionError("ExportedProgram.module() is a GraphModule")
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())  # flat inputs and outputs
    for node in list(graph.nodes):
        if node.target == "_guards_fn" or "_assert" in str(node.target):
            graph.erase_node(node)
    roundings: list[Rounding] = []
    for node in list(graph.nodes):
        if _name(node) in ("conv2d", "linear") and _is_activation(node.args[0]):
            roundings.append(_mark_(module, node, len(roundings)))
    for node in list(graph.nodes):
        if _is_activation(node) and node.users:
            user = next(iter(node.users))
            raise ExportError(
                f"ncnn rounds inputs of conv2d and linear only, not of {user.name}: "
                "take it out of the quantized operations"
            )
        if _is_constant(node):
            _make_float_(module, node)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    (out,) = (node for node in graph.nodes if node.op == "output")
    results = [leaf for leaf in tree_leaves(out.args) if isinstance(leaf, fx.Node)]
    return module, roundings, [list(leaf.meta["val"].shape) for leaf in results]


def _mark_(module: fx.GraphModule, node: fx.Node, i: int) -> Rounding:
    """Put a marker in front of `node` and a placeholder in place of its weight."""
    graph, (x, w, *rest) = module.graph, node.args
    if not isinstance(x, fx.Node) or not isinstance(w, fx.Node) or not _is_constant(w):
        raise ExportError(f"{node.name} has an int8 input but no int8 weight: quantize both")
    quantize = x.args[0]
    if not isinstance(quantize, fx.Node):
        raise AssertionError("dequantize follows quantize")
    source, scale, zero, low, high = quantize.args[:5]
    if (zero, low, high) != (0, -127, 127):
        raise ExportError(
            f"ncnn rounds to -127..127 around 0, but the input of {node.name} is rounded to "
            f"{low}..{high} around {zero}: use the grid of this backend's scheme"
        )
    integers, weight_scale = _integers(module, w)
    random = torch.Generator().manual_seed(i)
    placeholder = torch.randn(integers.shape, generator=random)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    module.add_module(f"marker_{i}", Marker())
    module.register_buffer(f"placeholder_{i}", placeholder)
    with graph.inserting_before(node):
        marker = graph.call_module(f"marker_{i}", (source,))
        weight = graph.get_attr(f"placeholder_{i}")
    node.args = (marker, weight, *rest)
    return Rounding(
        place=node.name,
        placeholder=placeholder.numpy(),
        weight=integers.numpy(),
        weight_scale=weight_scale.expand(integers.shape[0]).numpy(),
        input_scale=float(scale),  # type: ignore[arg-type]  # a Python constant by contract
        bias=_value(module, bias).numpy() if isinstance(bias, fx.Node) else None,
    )


def _make_float_(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a dequantized constant by the floats that it stands for."""
    name = f"float_{node.name}"
    module.register_buffer(name, _value(module, node))
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(module.graph.get_attr(name))


def _value(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The floats of a constant, be it dequantized or float already."""
    if not _is_constant(node):
        return _attribute(module, node).detach().float()
    integers, scale = _integers(module, node)
    axis = node.args[3] if _name(node) == "dequantize_per_channel" else 0
    shape = [-1 if i == axis else 1 for i in range(integers.dim())]
    return integers.float() * scale.reshape(shape)


def _integers(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Integers and scales (one, or one a channel) of a dequantized constant."""
    scale, zero = (
        _attribute(module, arg).reshape(-1).float()
        if isinstance(arg, fx.Node)
        else torch.tensor([float(arg)])  # type: ignore[arg-type]  # a number by the schema
        for arg in node.args[1:3]
    )
    if zero.any():
        raise ExportError(f"ncnn has symmetric weights only, but {node.name} has a zero point")
    weight = node.args[0]
    if not isinstance(weight, fx.Node):
        raise AssertionError("the operator's schema says that this is a tensor")
    return _attribute(module, weight).detach(), scale


def _attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    if node.op != "get_attr":
        raise ExportError(f"{node.name} is computed in the program; ncnn needs a constant there")
    return (
        module.get_parameter(str(node.target))
        if _is_parameter(module, node)
        else (module.get_buffer(str(node.target)))
    )


def _is_parameter(module: fx.GraphModule, node: fx.Node) -> bool:
    return str(node.target) in dict(module.named_parameters(remove_duplicate=False))


def _is_activation(node: object) -> bool:
    """Whether `node` dequantizes what was quantized just before, and is no constant."""
    return (
        isinstance(node, fx.Node)
        and _name(node) == "dequantize_per_tensor"
        and isinstance(node.args[0], fx.Node)
        and _name(node.args[0]) == "quantize_per_tensor"
    )


def _is_constant(node: fx.Node) -> bool:
    return _name(node).startswith("dequantize_per_") and not _is_activation(node)


def _name(node: fx.Node) -> str:
    """Name of an operator without namespace and overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return ""


def _run_pnnx(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, bytes]:
    """Text of the .param and bytes of the .bin file that pnnx makes of a module."""
    pnnx = _package("pnnx").EXEC_PATH
    kinds = {torch.float32: "f32", torch.int64: "i64", torch.int32: "i32"}
    bad = [str(t.dtype) for t in inputs if t.dtype not in kinds]
    if bad:
        raise ExportError(f"ncnn takes float32 and integer inputs, not {', '.join(bad)}")
    sizes = [str(list(t.shape)).replace(" ", "") + kinds[t.dtype] for t in inputs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(module, inputs, check_trace=False), path)
        done = subprocess.run(
            [pnnx, path.name, f"inputshape={','.join(sizes)}", "fp16=0",
             f"moduleop={MARKER}"],
            cwd=folder, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        param, weights = Path(folder) / PARAM, Path(folder) / BIN
        if done.returncode != 0 or not param.exists() or not weights.exists():
            raise ExportError(_pnnx_failure(done.returncode, done.stdout + done.stderr))
        return param.read_text(), weights.read_bytes()


def _pnnx_failure(code: int, said: str) -> str:
    passes = re.findall(r"^#+ (pass_\w+)", said, re.MULTILINE)
    how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"failed (code {code})"
    where = f" in {passes[-1]}" if passes else ""
    tail = said[said.rfind(passes[-1]) + len(passes[-1]) :] if passes else said
    last = [line for line in tail.splitlines() if line.strip(" -")]
    what = f", last seen: {last[-1].strip()}" if last else ""
    return f"pnnx {how}{where}{what}. Replace that operation, or keep this model off ncnn"


def _array(tensor: Tensor) -> np.ndarray:
    """One input without its batch dimension."""
    if tensor.dim() == 0 or tensor.shape[0] != 1:
        raise ExportError(f"ncnn takes one sample at a time, not a batch {tuple(tensor.shape)}")
    kind = torch.float32 if tensor.is_floating_point() else torch.int32
    return tensor.detach()[0].to("cpu", kind).contiguous().numpy()


def _number(name: str) -> int:
    """The 3 of ``in3`` and ``out3``."""
    digits = re.search(r"\d+$", name)
    return int(digits.group()) if digits else 0


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Catch what C code prints; the list holds it afterwards."""
    said: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield said
        finally:
            for number, old in enumerate(before, start=1):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _last_line(said: list[str]) -> str:
    lines = "".join(said).strip().splitlines()
    return lines[-1] if lines else "the files are damaged"


def _package(name: str) -> Any:
    try:
        with _captured():
            return import_module(name)
    except ImportError as error:
        raise ExportError(f"the ncnn backend needs {name}: pip install {name}") from error
