"""Says before any training what a target cannot run, runs in float, or runs slowly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from slimkit.acceptance import check_module, check_samples, check_single
from slimkit.batches import as_inputs, first_sample, to_cpu
from slimkit.calls import WEIGHTED, Call, Trace, trace
from slimkit.copies import copied
from slimkit.deploy.deployed import MISREAD, TOO_SMALL, refuse_other, size_bytes
from slimkit.errors import SlimkitError, in_one_line
from slimkit.interfaces import Backend, Scheme
from slimkit.quantization.calibration import quantize
from slimkit.quantization.fake import QuantizedModel
from slimkit.quantization.finished import finish
from slimkit.quantization.widths import width_remark
from slimkit.registry import blame_for, discover

_MOVES = frozenset({
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "T", "mT", "movedim",
    "squeeze", "unsqueeze", "expand", "contiguous", "chunk", "split", "unbind", "getitem", "roll",
    "repeat", "narrow", "cat", "concat", "stack", "size", "dim", "numel", "shape", "data", "device",
    "dtype", "type", "to", "float", "detach", "clone", "is_floating_point", "dropout",
    "stochastic_depth",
})  # fmt: skip
"""Operations that compute nothing, or nothing in evaluation mode."""

_REWRITES = {
    "silu": ("hardswish", "silu-to-hardswish"),
    "sigmoid": ("hardsigmoid", "sigmoid-to-hardsigmoid"),
}


@dataclass(frozen=True)
class Preflight:
    """What one backend makes of one model.

    Args:
        backend: its name.
        kind: ``float`` or ``int8``.
        problems: what keeps it from compiling, one sentence each; empty if it will.
        in_float: of int8: sentence for sentence, which operations compute in float, why, and what
            helps.
        slow: what runs, but not at full speed, and what helps.
        remarks: what the backend says of its files itself (`Backend.remarks`).
        size_bytes: of the file or files that were made to try it; None where none were.
        larger: of int8: that its files are no smaller than those of the float model; empty if they
            are.
    """

    backend: str
    kind: str
    problems: tuple[str, ...] = ()
    in_float: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    size_bytes: int | None = None
    larger: str = ""

    def __str__(self) -> str:
        lines = [f"{self.backend}, {self.kind}: {'cannot run' if self.problems else 'runs'}"]
        lines += [f"  {line}" for line in self.problems]
        lines += [f"  in float: {line}" for line in self.in_float]
        lines += [f"  slow: {line}" for line in self.slow]
        lines += [f"  larger: {self.larger}"] if self.larger else []
        return "\n".join([*lines, *(f"  in the file: {line}" for line in self.remarks)])


def preflight(
    model: nn.Module,
    example_inputs: Any,
    backends: str | Backend | Iterable[str | Backend] | Mapping[str, Backend] = "onnxruntime",
    *,
    quantized: bool = True,
    weights: str | Mapping[str, Any] = "minmax",
    activations: str | Mapping[str, Any] = "minmax",
    keep_float: str | Iterable[str] = (),
    weight_bits: int | None = None,
) -> list[Preflight]:
    """Ask every backend about the float model, and about its int8, without a file being kept.

    Args:
        model: in float; it is not changed.
        example_inputs: a tensor, or a tuple of the forward's arguments: of samples on which ranges
            are found as well. The first one has the file's shapes.
        backends: plugins' names, or instances, one or several; or instances by name.
        quantized: whether int8 is asked about.
        weights: quantizer of the weights.
        activations: quantizer of the activations.
        keep_float: patterns of layers that stay in float.
        weight_bits: width of the weights' integers.

    Returns:
        For each backend one of float and, if asked, one of int8; ``print`` them.

    Raises:
        SlimkitError: the model is not in float or does not run on the inputs, or a name is
            unknown. What a backend raises is that backend's problem.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8))
        >>> print(preflight(net, torch.randn(1, 3, 8, 8), "ncnn")[1])
        ncnn, int8: runs
          in float: group_norm, 1 call (1): not among what it computes in integers
    """
    if isinstance(model, QuantizedModel):
        raise SlimkitError("preflight takes the float model, and makes its int8 itself")
    check_module(model, "preflight")
    check_single(model)
    own, inputs, found = copied(model).cpu().eval(), to_cpu(as_inputs(example_inputs)), []
    given = [keep_float] if isinstance(keep_float, str) else [*keep_float]
    options = {
        "weights": weights,
        "activations": activations,
        "weight_bits": weight_bits,
        "keep_float": [pattern for pattern in given if pattern != "auto"],
    }
    for choice in (weights, activations):  # an unknown one is no backend's problem
        discover().find("quantizer", choice if isinstance(choice, str) else choice["name"])
    try:
        with torch.no_grad():
            own(*first_sample(inputs))
    except Exception as error:  # whatever a model raises
        raise SlimkitError(
            f"{type(model).__name__} does not run on the example inputs: {in_one_line(error)}"
        ) from error
    check_samples(own, inputs)
    for name, backend in _named(backends):
        whole = _asked(own, inputs, Preflight(name, "float"), backend)
        found.append(whole)
        if quantized:
            integers = _integers(own, inputs, name, backend, options)
            misread = tuple(problem for problem in whole.problems if MISREAD in problem)
            # which int8 hides, since its own roundings may make as much of a difference
            problems = integers.problems or misread
            found.append(replace(integers, problems=problems, larger=_larger(integers, whole)))
    return found


def _larger(integers: Preflight, whole: Preflight) -> str:
    """That the files of int8 are no smaller than those of the float model, if so."""
    if integers.size_bytes is None or whole.size_bytes is None:
        return ""
    if integers.size_bytes < whole.size_bytes:
        return ""
    return f"{integers.size_bytes:,} bytes, in float {whole.size_bytes:,}: {TOO_SMALL}"


def _named(
    backends: str | Backend | Iterable[str | Backend] | Mapping[str, Backend],
) -> list[tuple[str, Backend]]:
    """The backends by name."""
    if isinstance(backends, Mapping):
        return [*backends.items()]
    known = discover()
    several = [backends] if isinstance(backends, str | Backend) else backends
    made = [known.create("backend", one) if isinstance(one, str) else one for one in several]
    return [(known.name_of("backend", one), one) for one in made]


def _asked(
    model: nn.Module, inputs: tuple[Any, ...], found: Preflight, backend: Backend
) -> Preflight:
    """With what the backend says stands in the way, and if nothing does, of what comes out."""
    try:
        deployable = finish(model, first_sample(inputs))
        with blame_for("backend", backend, f"checking {type(model).__name__}"):
            problems = tuple(backend.check(deployable))
    except SlimkitError as error:  # a runtime or a board that is missing among them
        return replace(found, problems=(str(error),))
    if problems:
        return replace(found, problems=problems)
    try:
        with blame_for("backend", backend, f"asked about {type(model).__name__}"):
            remarks = tuple(backend.remarks(deployable))
    except SlimkitError as error:
        remarks = (str(error),)
    found = replace(found, remarks=(*found.remarks, *remarks))
    try:
        with (
            blame_for("backend", backend, f"trying {type(model).__name__}"),
            TemporaryDirectory(prefix="slimkit-") as name,
        ):
            backend.compile(deployable, Path(name))
            refuse_other(backend, deployable, backend.load(Path(name)))
            return replace(found, size_bytes=size_bytes(Path(name)))
    except SlimkitError as error:
        return replace(found, problems=(str(error),))


def _integers(
    model: nn.Module,
    inputs: tuple[Any, ...],
    name: str,
    backend: Backend,
    options: Mapping[str, Any],
) -> Preflight:
    try:
        simulated = quantize(model, [(inputs,)], backend, **options)
    except SlimkitError as error:
        return Preflight(name, "int8", (str(error),))
    traced = trace(simulated.model, inputs)
    wide = width_remark(backend, options["weight_bits"])
    found = Preflight(
        name,
        "int8",
        in_float=tuple(_in_float(traced, simulated, backend.scheme)),
        slow=tuple(_slow(traced, simulated, backend)),
        remarks=(wide,) if wide else (),
    )
    return _asked(simulated, inputs, found, backend)


def _in_float(traced: Trace, simulated: QuantizedModel, scheme: Scheme) -> list[str]:
    """One sentence for each operation and reason, the most frequent first."""
    sites = simulated.fake.sites
    found: dict[tuple[str, str], list[Call]] = {}
    for call in traced.calls:
        known = call.op in scheme.operations | scheme.steps
        silent = call.op in _MOVES | scheme.keeps | scheme.fuses | {"batch_norm"}
        between = call.name in sites.outputs and sites.source(call, traced) is not None
        if call.name in sites.skipped:
            reason = sites.skipped[call.name]
        elif known or silent or not call.inputs or (call.op in scheme.tables and between):
            continue
        elif call.op in scheme.tables:
            reason = "not both what it reads and what it makes is rounded"
        else:
            reason = "not among what it computes in integers"
            better, rewrite = _REWRITES.get(call.op, ("", ""))
            looked_up = better in scheme.tables and between
            if better in scheme.operations | scheme.steps or looked_up:
                reason += f"; rewrite: [{rewrite}] makes it {better}, which is"
        found.setdefault((call.op, reason), []).append(call)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [
        f"{op}, {_counted(calls)}: {reason}"
        for (op, reason), calls in ordered
    ]  # fmt: skip


def _slow(traced: Trace, simulated: QuantizedModel, backend: Backend) -> list[str]:
    """Layers whose channels are no multiple of what the backend computes at full speed."""
    multiple = backend.channel_multiple
    if multiple == 1:
        return []
    odd, last = [], _last(traced)
    for call in traced.calls:
        path = call.weight_path if call.op in WEIGHTED and call.name not in last else None
        if path is not None and call.name in simulated.fake.sites.weights:
            channels = simulated.model.get_parameter(path).shape[0]
            if channels % multiple:
                odd.append(call)
    if not odd:
        return []
    return [
        f"channels that are no multiple of {multiple} come out of {_counted(odd)}: prune to it "
        f"(prune.round_to: {multiple}, the default for this backend), or fill up with "
        "rewrite: [pad-channels]"
    ]


def _last(traced: Trace) -> set[str]:
    """Layers behind which there is no other: their channels are what the model gives."""
    wanted, found = set(traced.outputs), set()
    for call in reversed(traced.calls):
        if wanted.isdisjoint(call.outputs):
            continue
        if call.op in WEIGHTED:
            found.add(call.name)
        else:
            wanted.update(call.inputs)
    return found


def _counted(calls: list[Call]) -> str:
    places = [call.name.split(":")[0].replace("/", ".") or "the model" for call in calls]
    unique = list(dict.fromkeys(places))
    listed = ", ".join(unique[:3]) + (", ..." if len(unique) > 3 else "")
    return f"{len(calls)} call{'s' if len(calls) > 1 else ''} ({listed})"
