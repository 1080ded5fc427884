"""The finished model: batch-norm folded, ranges fixed, weights turned into integers.

The simulation and the finished model are the same calls under the same names; here each call is
replaced by what the device computes, and `torch.export` writes the result down as a flat graph.
Batch-norm folds exactly: with one symmetric scale per output channel, multiplying a channel by a
constant changes its scale and, where the constant is negative, the sign of its integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed operations
from torch import Tensor, nn
from torch.fx import Node

from slimkit.calls import WEIGHTED, Call, Trace, trace
from slimkit.copies import copied
from slimkit.errors import ExportError, QuantizationError
from slimkit.interfaces import Deployable, Grid
from slimkit.quantization.fake import FakeQuantization, QuantizedModel
from slimkit.quantization.folding import NOT_FOLDED, affine, foldable, spread
from slimkit.quantization.mode import SiteMode
from slimkit.quantization.sites import Sites
from slimkit.silence import silenced

_ops = torch.ops.quantized_decomposed
_DROPOUTS = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
)
"""Idle, they give what they read. PyTorch 2.13 decomposes them into a copy, so that what overwrites
it would no longer overwrite what it is the same as."""
_INT32 = 2**31 - 1
_ROOM = 2**29  # of an integer bias: leaves the rest of int32 to the sums of products
_TINY = torch.finfo(torch.float32).tiny


def finish(model: nn.Module, example_inputs: tuple[Any, ...]) -> Deployable:
    """Turn a float model or a `QuantizedModel` into what a backend compiles.

    Args:
        model: not changed.
        example_inputs: the forward's arguments; their shapes are fixed in the result.

    Raises:
        ExportError: torch.export cannot write the model down.
    """
    fake = model.fake if isinstance(model, QuantizedModel) else None
    own = copied(model.model if isinstance(model, QuantizedModel) else model)
    module = Finished(own.cpu().eval(), copied(fake) if fake is not None else None, example_inputs)
    try:
        with torch.no_grad(), silenced():
            program = torch.export.export(module.eval(), example_inputs, strict=False)
    except Exception as error:
        scripted = [
            name or type(part).__name__
            for name, part in own.named_modules()
            if isinstance(part, torch.jit.ScriptModule)
        ]
        if scripted:
            raise ExportError(
                f"{scripted[0]} of {type(own).__name__} is TorchScript, which torch.export cannot "
                "write down: put in the module that it was made from"
            ) from error
        raise ExportError(
            f"torch.export cannot write {type(own).__name__} down: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. A forward that depends on the "
            "values of its data, or on anything but tensors, must be rewritten first."
        ) from error
    _drop_values_(program, {f"network.{path}" for path in module.replaced})
    changed = _changed_buffers(program)
    if changed:
        names = ", ".join(changed)
        raise ExportError(
            f"the forward of {type(own).__name__} changes {names}, which no file keeps from one "
            "run to the next: take it as an input and give it back as an output"
        )
    return Deployable(program, example_inputs, quantized=fake is not None)


def _drop_values_(program: torch.export.ExportedProgram, paths: set[str]) -> None:
    """Let tensors that no operation reads, and whose shapes are known by now, be of no elements."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        path = named.get(node.name)
        if path is None or path not in paths or node.users:
            continue
        held = program.state_dict if path in program.state_dict else program.constants
        held[path] = _like(held[path], torch.empty(0, dtype=held[path].dtype))
        node.meta["val"] = node.meta["val"].new_empty(0)


def _like(given: Tensor, value: Tensor) -> Tensor:
    """A value as a parameter, if what is given is one."""
    return nn.Parameter(value, requires_grad=False) if isinstance(given, nn.Parameter) else value


def _changed_buffers(program: torch.export.ExportedProgram) -> list[str]:
    """The buffers that the program writes to, through views as well."""
    named = program.graph_signature.inputs_to_buffers
    of: dict[Any, str] = {n: named[n.name] for n in program.graph.nodes if n.name in named}
    changed: dict[str, None] = {}
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for parameter, given in zip(schema.arguments if schema else (), node.args, strict=False):
            if parameter.alias_info is None or not isinstance(given, Node) or given not in of:
                continue
            of[node] = of[given]
            if parameter.alias_info.is_write:
                changed[of[given].removeprefix("network.")] = None
    return [*changed]


@dataclass
class _Weights:
    """The names of one layer's constants in `Finished`."""

    weight: str
    bias: str | None
    scale: str | None = None
    bias_scale: str | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class _Rounding:
    """Fixed parameters of one activation quantizer."""

    scale: float
    zero_point: int
    grid: Grid

    def __call__(self, x: Tensor) -> Tensor:
        grid = self.grid
        arguments = (self.scale, self.zero_point, grid.qmin, grid.qmax, _dtype(grid))
        return _ops.dequantize_per_tensor(_ops.quantize_per_tensor(x, *arguments), *arguments)


def _dtype(grid: Grid) -> torch.dtype:
    """The narrowest integers that hold the grid."""
    if grid.bits <= 8:
        return torch.int8 if grid.signed else torch.uint8
    return torch.int16 if grid.signed else torch.uint16


class Finished(nn.Module):
    """Runs a model with its calls replaced by what the device computes."""

    def __init__(
        self, model: nn.Module, fake: FakeQuantization | None, inputs: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self.network = model
        self.traced = traced = trace(model, inputs)
        self.sites = fake.sites if fake is not None else Sites()
        self.roundings: dict[str, _Rounding] = {}
        self._made: dict[str, list[str]] = {}  # path of a weight -> constants made of it
        for name in self.sites.activations:
            assert fake is not None
            scale, zero_point = fake[name].qparams()
            grid = fake.scheme.activations
            self.roundings[name] = _Rounding(float(scale), int(zero_point), grid)
        self.layers: dict[str, _Weights] = {}
        folded = {
            call: norm
            for call, norm in foldable(traced).items()
            if call not in self.sites.outputs and norm.name not in self.sites.inputs
        }
        self.skipped = {norm.name for norm in folded.values()}
        self.moved = {  # a rounding behind a folded batch-norm now sits behind its convolution
            call: self.sites.outputs[norm.name]
            for call, norm in folded.items()
            if norm.name in self.sites.outputs
        }
        state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        for call in traced.calls:
            if call.op in WEIGHTED and (call.name in folded or call.name in self.sites.weights):
                self._add_layer(call, folded.get(call.name), state, fake, traced)
        self._empty_unused_(traced)

    @torch.no_grad()
    def _add_layer(
        self,
        call: Call,
        norm: Call | None,
        state: dict[str, Tensor],
        fake: FakeQuantization | None,
        traced: Trace,
    ) -> None:
        """Make one layer's constants: folded, and integer where it is quantized."""
        path = call.weight_path or ""
        weight = state[path].detach()
        bias_path = call.bias_path
        bias = state[bias_path].detach().clone() if bias_path is not None else None
        factor = None
        if norm is not None:
            factor, shift = affine(norm, state)
            bias = (torch.zeros_like(shift) if bias is None else bias) * factor + shift
        at = f"layer{len(self.layers)}"
        names = _Weights(f"{at}_weight", None if bias is None else f"{at}_bias")
        if call.name not in self.sites.weights:
            assert factor is not None
            names.weight = self._kept(names.weight, path, weight * spread(factor, weight))
        else:
            assert fake is not None
            quantizer, _ = fake.sites.weights[call.name]
            fake.fit_weight_(quantizer, weight)
            grid = fake[quantizer].grid
            if not (grid.symmetric and (grid.per_channel or factor is None)):
                raise QuantizationError(
                    f"{call.name}: batch-norm behind it folds only into symmetric per-channel "
                    "weights; fold it before quantizing or use such a scheme"
                )
            scale, zero_point = fake[quantizer].qparams()
            integers = grid.quantize(weight, scale, zero_point)
            if factor is not None:
                integers = integers * spread(factor.sign(), weight)
                scale = scale * factor.abs()
                if not torch.equal(scale, grid.steps(scale)):
                    raise QuantizationError(
                        f"{call.name}: {NOT_FOLDED}, and this one was changed since the weights "
                        "were quantized (by a correction, or by training)"
                    )
            source = fake.sites.source(call, traced)
            step = None  # of the input, where the bias is an integer
            if bias is not None and fake.scheme.bias_bits == 32 and source is not None:
                step = self.roundings[source].scale
                if len(scale) == len(bias):
                    least = grid.steps((bias / (step * _ROOM)).abs())
                    integers, scale = _with_room(integers, scale, least)
            scale = torch.where(scale > _TINY, scale, torch.ones_like(scale))
            names.weight = self._kept(names.weight, path, integers.to(_dtype(grid)))
            names.grid = grid
            names.scale = self._scale(f"{at}_scale", path, scale, weight.shape[grid.axis])
            if bias is not None and step is not None:
                bias_scale = scale * step
                names.bias_scale = self._scale(f"{at}_bias_scale", path, bias_scale, len(bias))
                bias = (bias.double() / bias_scale).round().clamp(-_INT32, _INT32).to(torch.int32)
        if names.bias is not None and bias is not None:
            names.bias = self._kept(names.bias, f"{path}:bias", bias)
        self.layers[call.name] = names

    def _empty_unused_(self, traced: Trace) -> None:
        """Drop the tensors that constants have replaced, so that no file carries them twice."""
        replaced, needed = set[str](), set[str]()
        for call in traced.calls:
            gone = call.name in self.layers or call.name in self.skipped
            (replaced if gone else needed).update(call.state.values())
        self.replaced = replaced - needed
        for path in self.replaced:
            owner, _, name = path.rpartition(".")
            module = self.network.get_submodule(owner)
            tensor = getattr(module, name)
            # of no memory, but of the shape that a forward may ask for
            setattr(module, name, _like(tensor, tensor.new_empty(()).expand(tensor.shape)))

    def constants(self, names: _Weights) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one layer, dequantized in the graph where they are integers."""
        weight = getattr(self, names.weight)
        bias = None if names.bias is None else getattr(self, names.bias)
        if names.grid is not None and names.scale is not None:
            grid = names.grid
            weight = self._dequantized(weight, names.scale, grid.axis, grid.qmin, grid.qmax)
        if bias is not None and names.bias_scale is not None:
            bias = self._dequantized(bias, names.bias_scale, 0, -_INT32, _INT32)
        return weight, bias

    def _dequantized(self, q: Tensor, scale: str, axis: int, qmin: int, qmax: int) -> Tensor:
        zeros = getattr(self, f"{scale}_zeros")
        return _ops.dequantize_per_channel(
            q, getattr(self, scale), zeros, axis, qmin, qmax, q.dtype
        )

    def _kept(self, name: str, path: str, constant: Tensor) -> str:
        """The name that it has from now on: another one's where they are equal and of one weight.

        A layer that is called again and again has its constants once in a file.
        """
        for other in self._made.setdefault(path, []):
            before = getattr(self, other)
            if before.dtype == constant.dtype and torch.equal(before, constant):
                return other
        self._made[path].append(name)
        self.register_buffer(name, constant)
        return name

    def _scale(self, name: str, path: str, scale: Tensor, channels: int) -> str:
        kept = self._kept(name, f"{path}:scale", scale.reshape(-1).expand(channels).contiguous())
        if kept == name:
            self.register_buffer(f"{name}_zeros", torch.zeros(channels, dtype=torch.int64))
        return kept

    def forward(self, *args: Any) -> Any:
        """The model's outputs, computed as on the device."""
        with FinishedMode(self):
            return self.network(*args)


def _with_room(integers: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Integers for a scale of at least `least`, where the bias would not fit into 32 bits else.

    A batch-norm that all but silences a channel leaves it a tiny scale, in which its shift would
    be a huge integer.
    """
    wanted = torch.maximum(scale, least)
    same = torch.ones_like(scale)
    ratio = torch.where(scale < wanted, scale / wanted, same)
    return (integers * spread(ratio, integers)).round(), wanted


def _drops(op: str, args: Any, kwargs: Any) -> bool:
    """Whether a dropout is at work: ``training`` is the third parameter everywhere."""
    given = [*args[2:3], *(kwargs[name] for name in ("training", "train") if name in kwargs)]
    return bool(given[0]) if given else op not in ("alpha_dropout", "feature_alpha_dropout")


class FinishedMode(SiteMode):
    """Replaces each call by what the device computes."""

    def __init__(self, finished: Finished) -> None:
        super().__init__(finished.network, finished.sites)
        self.finished = finished

    def round(self, quantizer: str, x: Tensor) -> Tensor:
        """Quantize and dequantize, as operations of the graph."""
        return self.finished.roundings[quantizer](x)

    def has_constants(self, call: str) -> bool:
        """Whether the call's weight and bias are finished."""
        return call in self.finished.layers

    def constants(
        self,
        call: str,
        weight: Tensor,  # noqa: ARG002  (replaced)
        bias: Tensor | None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None]:
        """The finished weight and bias."""
        return self.finished.constants(self.finished.layers[call])

    def output(self, call: str) -> str | None:
        """The quantizer of what the call makes, with a batch-norm behind it folded."""
        return self.finished.moved.get(call) or super().output(call)

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Leave out what is folded or idle; else as the sites say."""
        idle = op in _DROPOUTS and not _drops(op, args, kwargs) and self.output(name) is None
        if name in self.finished.skipped or idle:
            return args[0] if args else kwargs["input"]
        return super().on_call(name, op, func, args, kwargs)
