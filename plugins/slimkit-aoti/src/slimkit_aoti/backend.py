"""AOTInductor on the CPU: the model as a library that torch compiles ahead of time."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
import torch._inductor
from torch import Tensor

from slimkit.disk import refuse_full
from slimkit.errors import ExportError, UnavailableError
from slimkit.interfaces import Backend, Deployable, Grid, Runner, Scheme, tensors_of
from slimkit.trial import Trial

FILE = "model.pt2"
_CALLS = re.compile(r"\baoti_torch_cpu_(\w+)\(|\b(cpp_fused_\w+)\(")
_SHAPES = "slimkit_input_shapes"
_INTEGER = ("_qconv", "_qlinear")


class Aoti(Backend):
    """A package of compiled code, by torch.export and AOTInductor, which torch runs.

    With weights frozen, Inductor turns a convolution between roundings into oneDNN's integer
    kernel: uint8 activations with a zero point, int8 weights per output channel, float bias. Linear
    layers stay in float: torch 2.13 fuses the sum behind a quantized one wrongly (a residual block
    of a transformer had 8 dB of signal to noise). What is not a convolution is compiled to fused
    loops. Compiling needs a C++ compiler and takes 10 to 60 seconds a model; the file holds code
    for the processor that it was compiled on and the version of torch.
    """

    channel_multiple = 16  # of oneDNN's integer kernels
    least_db = 80.0
    scheme: ClassVar[Scheme] = Scheme(
        activations=Grid(bits=8, signed=False, symmetric=False),
        weights=Grid(bits=8, per_channel=True),
        operations=frozenset({"conv2d"}),
    )

    def __init__(self) -> None:
        self._trial = Trial[bytes]()

    def check(self, deployable: Deployable) -> list[str]:
        """What Inductor or the compiler says against this program (it is compiled on trial)."""
        return self._trial.refused(deployable, lambda: _compiled(deployable))

    def weight_bits(self) -> int | None:
        """7 where oneDNN overflows with 8 on this processor; found by a sum, once a process.

        https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html
        """
        return _weight_bits()

    def compile(self, deployable: Deployable, directory: Path) -> None:
        """Write ``model.pt2``."""
        data = self._trial.take(deployable) or _compiled(deployable)
        (directory / FILE).write_bytes(data)

    def load(self, directory: Path, threads: int = 1) -> Runner:
        """Load the library; torch's own thread count is put back after every call."""
        path = directory / FILE
        if not path.is_file():
            raise ExportError(f"{path} is missing: export again")
        try:
            model = torch._inductor.aoti_load_package(str(path))
        except RuntimeError as error:
            raise ExportError(f"torch cannot load {path}: {_reason(error)}") from error

        shapes = json.loads(model.loader.get_metadata().get(_SHAPES, "null"))

        def run(*inputs: Tensor) -> list[Tensor]:
            given = [[*x.shape] for x in inputs]
            if given != shapes:  # the code would read beyond them
                raise ExportError(
                    f"{FILE} does not run on these inputs: it takes {_listed(shapes)}, "
                    f"{_listed(given)} were given"
                )
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    return tensors_of(model(*(x.detach().cpu().contiguous() for x in inputs)))
            except RuntimeError as error:
                raise ExportError(f"{FILE} does not run: {_reason(error)}") from error
            finally:
                torch.set_num_threads(before)

        return run

    def operators(self, directory: Path) -> dict[str, int]:
        """Calls in the compiled wrapper; oneDNN's integer kernels have ``int8`` behind."""
        with zipfile.ZipFile(directory / FILE) as package:
            names = [name for name in package.namelist() if name.endswith(".wrapper.cpp")]
            source = "".join(package.read(name).decode(errors="replace") for name in names)
        body = source.partition("::run_impl(")[2] or source
        calls = Counter(library or fused for library, fused in _CALLS.findall(body))
        return {
            f"{name} int8" if name.startswith(_INTEGER) else name: count
            for name, count in sorted(calls.items())
        }


@cache
def _weight_bits() -> int | None:
    """By a convolution of the largest integers, with the kernel that the compiled code calls."""
    onednn, n = torch.ops.onednn, 16
    given = torch.full((1, n, 1, 1), 255, dtype=torch.uint8)
    weight = torch.full((n, n, 1, 1), 127, dtype=torch.int8)
    scales, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int64)
    one, none = [1, 1], [0, 0]  # strides and dilations; padding
    packed = onednn.qconv_prepack(weight, scales, 1.0, 0, one, none, one, 1, [*given.shape])
    found = onednn.qconv_pointwise(
        *(given, 1.0, 0, packed, scales, zeros, None, one, none, one, 1),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    return None if float(found.min()) == 255 * 127 * n else 7


def _compiled(deployable: Deployable) -> bytes:
    """The package that Inductor makes of a program.

    Raises:
        UnavailableError: there is no C++ compiler.
        ExportError: Inductor cannot compile the program.
    """
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UnavailableError("the aoti backend needs a C++ compiler: install g++")
    facts = {_SHAPES: json.dumps([[*t.shape] for t in deployable.example_inputs])}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / FILE
        try:
            with _undisturbed(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    deployable.program,
                    package_path=str(path),
                    inductor_configs={"freezing": True, "aot_inductor.metadata": facts},
                )
        except Exception as error:  # Inductor wraps whatever failed
            refuse_full(Path(name))
            raise ExportError(
                f"AOTInductor cannot compile this model: {_reason(error)}. Replace that operation, "
                "or cut it off and compute it outside"
            ) from error
        return path.read_bytes()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, torch's warnings about its own code are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _listed(shapes: list[list[int]]) -> str:
    return "inputs of shape " + (", ".join(str(tuple(shape)) for shape in shapes) or "none")


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
