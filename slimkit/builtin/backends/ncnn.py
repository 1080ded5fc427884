"""ncnn: a .param and a .bin file for phones and small boards, in float or int8."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimkit.builtin.backends.ncnn_model import read_param, to_int8, write_param
from slimkit.builtin.backends.ncnn_program import MARKER, with_markers
from slimkit.disk import refuse_full
from slimkit.errors import ExportError
from slimkit.importing import required
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme
from slimkit.silence import captured
from slimkit.trial import Trial

PARAM, BIN, SHAPES = "model.ncnn.param", "model.ncnn.bin", "shapes.json"


class Ncnn(Backend):
    """Files for ncnn, in float by pnnx and in int8 by slimkit, exact under ncnn's default options.

    The input of each convolution and linear layer is rounded to symmetric int8 per tensor, weights
    per output channel; everything between is float, depthwise convolutions too: in int8 they took
    twice as long here (MobileNet v1 0.25, x86), and ncnn's kernel scales their sums by an
    approximate reciprocal (12 bits), which no simulation can follow. ncnn has no batch dimension:
    inputs are (1, ...). Channels are packed by 8 where they are a multiple of it, in int8 always.
    """

    channel_multiple = 8
    least_db = 80.0
    scheme = Scheme(
        activations=Grid(bits=8),
        weights=Grid(bits=8, per_channel=True),
        operations=frozenset({"conv2d", "linear"}),
        depthwise=False,
        arithmetic="dequantize",
    )

    def __init__(self) -> None:
        self._trial = Trial[dict[str, bytes]]()

    def check(self, deployable: Deployable) -> list[str]:
        """What pnnx or ncnn says against this program (it is compiled on trial)."""
        return self._trial.refused(deployable, lambda: _compiled(deployable))

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.ncnn.param``, ``model.ncnn.bin`` and the shapes, which they lack."""
        files = self._trial.take(deployable) or _compiled(deployable)
        for name, data in files.items():
            (directory / name).write_bytes(data)

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
        takes, gives = _shapes(directory / SHAPES)
        with captured() as said:
            failed = net.load_param(str(directory / PARAM)) or net.load_model(str(directory / BIN))
        if failed:
            raise ExportError(f"ncnn cannot load {directory}: {_last_line(said())}")
        inputs = sorted(net.input_names(), key=_number)
        # what nobody reads is an output to ncnn, inputs too
        outputs = sorted(set(net.output_names()) - set(inputs), key=_number)

        def run(*tensors: Tensor) -> list[Tensor]:
            if len(tensors) != len(inputs):
                raise ExportError(f"{PARAM} takes {len(inputs)} inputs, {len(tensors)} were given")
            arrays = [_array(t, shape) for t, shape in zip(tensors, takes, strict=True)]
            # Must live until all is extracted. Copies: ncnn's layers compute in place, and those
            # that do so on memory that is not ncnn's own crash (LayerNorm) or overwrite the input.
            mats = [ncnn.Mat(array).clone() for array in arrays]
            extractor = net.create_extractor()
            for name, mat in zip(inputs, mats, strict=True):
                extractor.input(name, mat)
            found = []
            for name, shape in zip(outputs, gives, strict=True):
                code, mat = extractor.extract(name)
                if code != 0:
                    raise ExportError(f"ncnn failed with code {code} to compute {name} of {PARAM}")
                values = np.array(mat)
                if values.size != math.prod(shape):
                    raise ExportError(
                        f"ncnn gives {values.size} values where {name} of {PARAM} has the shape "
                        f"{tuple(shape)}: it has misread an operation; replace that in the model, "
                        "or cut it off and compute it outside"
                    )
                found.append(torch.from_numpy(values).reshape(shape))
            return found

        return run

    def operators(self, directory: Path) -> dict[str, int]:
        """Layer types; those that compute on integers have ``int8`` behind their name."""
        layers = read_param((directory / PARAM).read_text())
        names = [f"{x.type} int8" if x.int8 else x.type for x in layers if x.type != "Input"]
        return dict(sorted(Counter(names).items()))


def _compiled(deployable: Deployable) -> dict[str, bytes]:
    """Each file's name and content."""
    ncnn = _package("ncnn")
    if not all(t.dim() for t in deployable.example_inputs):
        raise ExportError(
            "ncnn takes no input without a dimension, such as torch.tensor(2.0): give it one, of "
            "shape (1,), or make it a constant of the model"
        )
    batches = {t.shape[0] for t in deployable.example_inputs}
    if batches != {1}:
        raise ExportError(
            f"ncnn has no batch dimension, but the inputs have batches of {sorted(batches)}: "
            "export with example inputs of batch size 1"
        )
    module, roundings, shapes = with_markers(deployable)
    param, weights = _run_pnnx(module, deployable.example_inputs)
    layers, weights = to_int8(read_param(param), weights, roundings, MARKER)
    unknown = sorted({x.type for x in layers if ncnn.layer_to_index(x.type) < 0})
    if unknown:
        raise ExportError(
            f"ncnn has no layer for {', '.join(unknown)} (pnnx left it as it was): replace "
            "that operation in the model, or cut it off and compute it outside"
        )
    ports = {"inputs": [[*t.shape] for t in deployable.example_inputs], "outputs": shapes}
    return {
        PARAM: write_param(layers).encode(),
        BIN: weights,
        SHAPES: (json.dumps(ports) + "\n").encode(),
    }


def _shapes(path: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Those of the inputs and those of the outputs."""
    try:
        ports = json.loads(path.read_text())
        return ports["inputs"], ports["outputs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is damaged: export again") from error


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
            script = io.BytesIO()  # told a path, torch ends the process when the disk is full
            torch.jit.save(torch.jit.trace(module, inputs, check_trace=False), script)
        path.write_bytes(script.getvalue())
        done = subprocess.run(
            [pnnx, path.name, f"inputshape={','.join(sizes)}", "fp16=0",
             f"moduleop={MARKER}"],
            cwd=folder, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        refuse_full(Path(folder))  # of which pnnx says nothing
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


def _array(tensor: Tensor, shape: list[int]) -> np.ndarray:
    """One input without its batch dimension; of another shape, ncnn would read beyond it."""
    if [*tensor.shape] != shape:
        raise ExportError(
            f"{PARAM} does not run on these inputs: it takes one sample of shape {tuple(shape)}, "
            f"{tuple(tensor.shape)} was given"
        )
    kind = torch.float32 if tensor.is_floating_point() else torch.int32
    return tensor.detach()[0].to("cpu", kind).contiguous().numpy()


def _number(name: str) -> int:
    """The 3 of ``in3`` and ``out3``."""
    digits = re.search(r"\d+$", name)
    return int(digits.group()) if digits else 0


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else "the files are damaged"


def _package(name: str) -> Any:
    with captured():  # it prints
        return required(name, "ncnn")
