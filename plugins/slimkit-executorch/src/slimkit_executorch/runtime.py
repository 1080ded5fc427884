"""The ExecuTorch runtime of this process: its one pool of threads, and the programs that use it."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimkit.errors import ExportError
from slimkit.importing import required
from slimkit.silence import captured, silenced

METHOD = "forward"


class Pool:
    """ExecuTorch's threads, which all programs of a process share.

    XNNPACK keeps the pool that it finds when a program is loaded, so a program has to be loaded
    again once the pool was replaced by one of another size; `turn` counts that.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.turn = 0

    def use(self, threads: int) -> None:
        """Have `threads` threads; the calling one is among them."""
        library = bindings()
        if library._threadpool_get_thread_count() != threads:
            with listening():
                library._unsafe_reset_threadpool(threads)
            self.turn += 1


POOL = Pool()


class Loaded:
    """A program that is ready to run on a number of threads.

    Args:
        data: the file's content.
        name: of the file, for messages.
        threads: to compute on.
        traced: whether to write down what runs, and how long it takes.

    Raises:
        ExportError: the runtime cannot load it.
    """

    def __init__(self, data: bytes, name: str, threads: int = 1, *, traced: bool = False) -> None:
        self.data, self.name, self.threads, self.traced = data, name, threads, traced
        with POOL.lock:
            self._open()
        meta = self.method.metadata
        inputs = [meta.input_tensor_meta(n) for n in range(meta.num_inputs())]
        self.shapes = [tuple(one.sizes()) for one in inputs]
        self.types = [torch.tensor((), dtype=_TYPES[one.dtype()]).dtype for one in inputs]

    def _open(self) -> None:
        POOL.use(self.threads)
        self.turn = POOL.turn
        self.method: Any = None
        try:
            with listening() as said:
                self.program = runtime().load_program(self.data, enable_etdump=self.traced)
                self.method = self.program.load_method(METHOD)
        except (RuntimeError, KeyError) as error:
            raise ExportError(
                f"ExecuTorch cannot load {self.name}: {reason(error, said)}"
            ) from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs, in memory of their own.

        Raises:
            ExportError: the inputs do not fit.
        """
        if len(inputs) != len(self.shapes):
            raise ExportError(
                f"{self.name} takes {len(self.shapes)} inputs, {len(inputs)} were given"
            )
        given = [x.detach().cpu().contiguous() for x in inputs]
        for n, (x, shape, kind) in enumerate(zip(given, self.shapes, self.types, strict=True)):
            if (tuple(x.shape), x.dtype) != (shape, kind):
                raise ExportError(
                    f"{self.name} does not run on these inputs: input {n} is {kind} of shape "
                    f"{shape}, {x.dtype} of shape {tuple(x.shape)} was given"
                )
        with POOL.lock:
            POOL.use(self.threads)
            if self.turn != POOL.turn:
                self._open()
            try:
                return [out for out in self.method.execute(given) if isinstance(out, Tensor)]
            except RuntimeError as error:
                raise ExportError(f"{self.name} does not run: {error}") from error

    def trace(self) -> bytes:
        """What has run since it was loaded, as an ETDump."""
        with tempfile.TemporaryDirectory() as name:
            files = [Path(name) / file for file in ("trace.etdp", "values.bin")]
            self.program.write_etdump_result_to_file(*map(str, files))
            return files[0].read_bytes()


_TYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
"""ExecuTorch's numbers of types, which are those of torch."""


def part(module: str) -> Any:
    """A module of ExecuTorch's, imported without the warnings of what it imports.

    Raises:
        UnavailableError: ExecuTorch is not installed.
    """
    with silenced(), listening():
        return required(f"executorch.{module}", "executorch", "executorch")


@cache
def bindings() -> Any:
    """ExecuTorch's compiled module, with the kernels for what is quantized outside XNNPACK."""
    part("runtime")
    part("kernels.quantized")
    library = part("extension.pybindings.portable_lib")
    with listening():
        library._threadpool_get_thread_count()  # makes the pool, and looks at the processor
    return library


@cache
def runtime() -> Any:
    """ExecuTorch's runtime."""
    bindings()
    return part("runtime").Runtime.get()


@contextmanager
def listening() -> Iterator[Callable[[], str]]:
    """Inside, nothing is printed, nor warned of; what ExecuTorch said can be called afterwards."""
    with captured() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield said


def reason(error: BaseException, said: Callable[[], str]) -> str:
    """What the runtime wrote in front of an error, which has no more than a number."""
    lines = [line.partition("] ")[2].strip() for line in said().splitlines() if "] " in line]
    own = str(error).strip().splitlines() or [type(error).__name__]
    return (lines or own)[0].rstrip(".")
