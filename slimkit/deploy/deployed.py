"""A model as files on disk that a runtime executes, with tensors in and tensors out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from slimkit.batches import first_sample, samples_in, samples_of
from slimkit.decibels import decibels
from slimkit.deploy.agreement import differences
from slimkit.errors import ExportError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Backend, Deployable, Runner, tensors_of
from slimkit.quantization.exact import exact
from slimkit.quantization.finished import finish
from slimkit.registry import blame_for

LEAST_INT8_DB, LEAST_CHOICE_DB = 10.0, 20.0
"""Signal to difference below which a file in int8, and an output of whole numbers, whose ties fall
either way, is of another model."""
MISREAD = "it has misread an operation"
TOO_SMALL = "quantization saves nothing; the model is too small for int8 to pay"
_WAY_OUT = (
    "Replace what is unusual, such as options of a pooling, a padding or an interpolation, or cut "
    "it off and compute it outside"
)


class Deployed:
    """A compiled model: call it like the module it came from.

    The file has the batch size it was made with (one sample); larger batches are run sample by
    sample.

    Args:
        runner: the opened file.
        rebuild: puts flat output tensors back into the model's own structure.
    """

    def __init__(self, runner: Runner, rebuild: Callable[[list[Tensor]], Any], batch: int) -> None:
        self.runner = runner
        self._rebuild = rebuild
        self._batch = batch

    def flat(self, *inputs: Any) -> list[Tensor]:
        """The outputs as a flat list, computed by the file."""
        tensors = tuple(t.detach().cpu() for t in tree_leaves(inputs) if isinstance(t, Tensor))
        sizes = sorted({len(t) for t in tensors if t.dim()})
        if not tensors or 0 in sizes:
            raise ExportError("the file was given no sample to run on")
        if len(sizes) > 1:
            raise ExportError(
                f"the inputs hold {sizes[0]} and {sizes[-1]} samples: give as many of each"
            )
        size = samples_in(tensors)
        if size % self._batch:
            raise ExportError(
                f"the file was made for batches of {self._batch}; {size} is no multiple of it"
            )
        pieces = []
        for start in range(0, size, self._batch):
            part = samples_of(tensors, start, start + self._batch)
            found = self.runner(*(t.contiguous() for t in part))
            pieces.append([t.detach().cpu() for t in found])
        return [_joined(column, self._batch) for column in zip(*pieces, strict=True)]

    def __call__(self, *inputs: Any) -> Any:
        """The model's outputs, in its own structure."""
        return self._rebuild(self.flat(*inputs))


def _joined(pieces: Sequence[Tensor], batch: int) -> Tensor:
    """One output of all samples; one that has no batch dimension is the same for all."""
    if pieces[0].dim() and pieces[0].shape[0] == batch:
        return torch.cat(list(pieces))
    return pieces[0]


def compile_(
    model: nn.Module,
    backend: Backend,
    example_inputs: tuple[Any, ...],
    directory: Path,
    *,
    compared: bool = True,
) -> tuple[Deployable, Deployed]:
    """Compile `model` into the new folder `directory` and open it on one thread.

    Args:
        model: a float model or a `QuantizedModel`; not changed.
        backend: compiles it.
        example_inputs: the forward's arguments; one sample of them sets the file's shapes.
        directory: made here; removed again if anything fails.
        compared: whether a float file that computes something else is refused; of an int8 file the
            agreement tells.

    Raises:
        ExportError: the backend cannot compile or run it, or int8 was asked for and the file holds
            none.
    """
    inputs = first_sample(example_inputs)
    deployable = finish(model, inputs)
    with blame_for("backend", backend, f"checking {type(model).__name__}"):
        problems = backend.check(deployable)
    if problems:
        name = type(backend).__name__
        raise ExportError("\n  ".join([f"{name} cannot run this model:", *problems]))
    directory.mkdir(parents=True)
    try:
        with blame_for("backend", backend, f"compiling {type(model).__name__}"):
            backend.compile(deployable, directory)
        if not any(directory.iterdir()):
            raise ExportError(f"{type(backend).__name__} wrote no file into {directory}")
        deployed = open_(backend, directory, deployable)
        if compared and not deployable.quantized:
            refuse_other(backend, deployable, deployed.runner)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return deployable, deployed


def refuse_other(backend: Backend, deployable: Deployable, runner: Runner) -> None:
    """Refuse a file that computes something else than what it was made from.

    Converters that misread an operation say nothing of it. In float, the bound is the backend's
    (`Backend.least_db`); what differs by a hundred-thousandth of the largest value is let through.

    Args:
        backend: made the file.
        deployable: what the file was made from; both run on its example.
        runner: the opened file.

    Raises:
        ExportError: the outputs are others.
    """
    name, exact = type(backend).__name__, not deployable.quantized
    least = backend.least_db if exact else LEAST_INT8_DB
    leaves = [t for t in tree_leaves(deployable.example_inputs) if isinstance(t, Tensor)]
    found = [t.detach().cpu() for t in runner(*(t.detach().cpu().contiguous() for t in leaves))]
    module = deployable.program.module(check_guards=False)
    with torch.no_grad():
        expected = tensors_of(module(*deployable.example_inputs))
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (expected, found)]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"the file of {name} gives outputs of shapes {shapes[1]}, and the model {shapes[0]}: "
            f"{MISREAD}. {_WAY_OUT}"
        )
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        difference, signal = differences(a, b)
        finite = a[a.isfinite()].double()
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        if not a.numel() or float(difference.max()) <= 1e-5 + (1e-5 if exact else 1e-3) * largest:
            continue
        ratio = decibels(signal, float(difference.square().sum()))
        if ratio < (least if a.is_floating_point() else min(least, LEAST_CHOICE_DB)):
            raise ExportError(
                f"the file of {name} computes something else than the model: its output {number} "
                f"has {ratio:.0f} dB of signal to difference on the example; {MISREAD}. {_WAY_OUT}"
            )


def open_(backend: Backend, directory: Path, deployable: Deployable, threads: int = 1) -> Deployed:
    """Open compiled files; outputs come back in the structure of the program's."""
    spec = deployable.program.call_spec.out_spec
    assert spec is not None

    def rebuild(flat: list[Tensor]) -> Any:
        return tree_unflatten(flat, spec)

    leaves = [t for t in tree_leaves(deployable.example_inputs) if isinstance(t, Tensor)]
    batch = leaves[0].shape[0] if leaves[0].dim() else 1
    return Deployed(backend.load(directory, threads=threads), rebuild, batch)


def size_bytes(directory: Path) -> int:
    """Bytes of all files below `directory`."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def temporary(parent: Path | None = None) -> Path:
    """A new empty folder, beside `parent` where given (so that a rename stays on one disk)."""
    return Path(tempfile.mkdtemp(prefix=".slimkit-", dir=parent))


@torch.no_grad()
def simulate(model: nn.Module, *inputs: Any) -> list[Tensor]:
    """Flat outputs of the float model or the simulation, in evaluation mode, as one batch.

    The simulation is `exact` where the backend's arithmetic is known to the last bit.
    """
    model = exact(model, first_sample(inputs))
    with evaluating(model):
        return tensors_of(model(*inputs))
