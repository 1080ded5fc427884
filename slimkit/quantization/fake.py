"""The fake-quantizers of a model, and the mode that puts them into its operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimkit.batches import fresh
from slimkit.calls import WEIGHTED, Trace, trace
from slimkit.errors import QuantizationError
from slimkit.evaluating import evaluating
from slimkit.interfaces import Grid, Quantizer, Scheme
from slimkit.quantization.folding import refuse_unfolded
from slimkit.quantization.mode import SiteMode
from slimkit.quantization.sites import Sites, find_sites, prescribed
from slimkit.registry import blame_for

Maker = Callable[[Grid], Quantizer]
State = Literal["float", "observe", "quantize"]
Choice = str | Mapping[str, Any]
"""A quantizer's name, or ``{"name": ..., "options": {...}}``."""


class FakeQuantization(nn.Module):
    """Simulates a backend's integer arithmetic in a float model.

    The quantizers are this module's children, so ranges are saved and moved with it; the model
    itself is not changed and not owned. Weight ranges follow the weights at every forward;
    activation ranges are those of the calibration. Learned ranges are the optimizer's from the
    first rounding on.

    Args:
        sites: where the quantizers sit.
        scheme: the backend's arithmetic.
        weights: makes a quantizer for a weight's grid.
        activations: makes a quantizer for an activation's grid.
        parameters: the model's parameters by dotted path; only their shapes and device are used.
    """

    def __init__(
        self,
        sites: Sites,
        scheme: Scheme,
        weights: Maker,
        activations: Maker,
        parameters: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.sites = sites
        self.scheme = scheme
        self.state: State = "float"
        self.follows = False  # activation ranges go on observing while they round, in training
        self.only: frozenset[str] | None = None  # round nothing but these, to see what they cost
        self.quantizers = nn.ModuleDict()
        for name in sites.activations:
            self.quantizers[_key(name)] = self._activation(name, activations)
        self._blank: dict[str, dict[str, Tensor]] = {}
        for call, (name, path) in sites.weights.items():
            axis = 1 if "conv_transpose" in call else 0
            quantizer = weights(scheme.weights.sized(parameters[path], axis))
            self.quantizers[_key(name)] = quantizer
            self._blank[name] = {k: b.clone() for k, b in quantizer.named_buffers()}
        self._begun: set[str] = set()  # learned weight ranges that have seen their weight
        self.to(next((p.device for p in parameters.values()), torch.device("cpu")))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        scheme: Scheme,
        weights: Maker,
        activations: Maker,
        keep_float: Sequence[str] = (),
        more_inputs: tuple[Any, ...] | None = None,
    ) -> FakeQuantization:
        """Trace `model` once on `example_inputs` and place the quantizers that `scheme` asks for.

        Args:
            model: the float model; not changed.
            example_inputs: the forward's arguments.
            scheme: the backend's arithmetic.
            weights: makes a quantizer for a weight's grid.
            activations: makes a quantizer for an activation's grid.
            keep_float: patterns of modules or calls that stay in float.
            more_inputs: a batch to look for masks of minus infinity on; left out, the example.

        Raises:
            QuantizationError: the backend could compute nothing of this model in integers.
        """
        traced = trace(model, example_inputs)
        if scheme.weights.power_of_two:
            refuse_unfolded(model, traced)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        apart = {
            call.name: "its weight is a buffer: make it a parameter, if without gradient"
            for call in traced.calls
            if call.op in WEIGHTED and call.weight_path and call.weight_path not in parameters
        }
        sites = find_sites(traced, scheme, keep_float, apart)
        if sites.weights or sites.activations:
            made = cls(sites, scheme, weights, activations, parameters)
            masks = _masks(made, traced, model, more_inputs or example_inputs)
            if not masks:
                return made
            reason = "it reads or makes minus infinity, as masks of attention do"
            sites = find_sites(traced, scheme, keep_float, apart | dict.fromkeys(masks, reason))
        if not sites.weights and not sites.activations:
            why = [f"{', '.join(calls[:3])}: {reason}" for reason, calls in _by_reason(sites)]
            wanted = ", ".join(sorted(scheme.operations))
            raise QuantizationError(
                f"nothing of {type(model).__name__} would be quantized: "
                + (
                    "; ".join(why)
                    or "it calls none of the operations that the backend computes in integers "
                    f"({wanted})"
                )
            )
        return cls(sites, scheme, weights, activations, parameters)

    def __getitem__(self, name: str) -> Quantizer:
        """The quantizer called `name` in `sites`."""
        return self.quantizers[_key(name)]  # type: ignore[return-value]

    def renew_activations_(self, make: Maker) -> None:
        """Put new activation quantizers, which have seen nothing, in place of the old."""
        device = next((b.device for b in self.buffers()), torch.device("cpu"))
        for name in self.sites.activations:
            self.quantizers[_key(name)] = self._activation(name, make).to(device)

    def _activation(self, name: str, make: Maker) -> Quantizer:
        """What rounds an activation; the runtime prescribes some."""
        given = prescribed(name, self.scheme)
        if given is None:
            return make(self.scheme.activations)
        fixed = Fixed(self.scheme.activations)
        fixed.scale.fill_(given[0])
        fixed.zero_point.fill_(given[1])
        return fixed

    def keep_only_(self, sites: Sites) -> None:
        """Forget the quantizers that `sites` does not name."""
        named = {*sites.activations, *(name for name, _ in sites.weights.values())}
        for key in set(self.quantizers) - {_key(name) for name in named}:
            del self.quantizers[key]
        self._blank = {name: state for name, state in self._blank.items() if name in named}

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """Inside, forwards of `model` (and of its submodules) go through the fake-quantizers."""
        if self.state == "float":
            yield
            return
        with _FakeMode(model, self):
            yield

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """Fake-quantize a weight over its present range, or over its learned one."""
        with blame_for("quantizer", self[name], f"rounding {name}"):
            self.fit_weight_(name, weight)
            return self[name](weight)

    @torch.no_grad()
    def fit_weight_(self, name: str, weight: Tensor) -> None:
        """Forget the range of the weight quantizer `name` and observe `weight` afresh.

        A learned range is set at the first call only.
        """
        quantizer = self[name]
        if isinstance(quantizer, Fixed) or name in self._begun:
            return
        if learns(quantizer):
            self._begun.add(name)
        blank = self._blank[name]
        for key, buffer in quantizer.named_buffers():
            if blank[key].device != buffer.device:
                blank[key] = blank[key].to(buffer.device)
            buffer.copy_(blank[key])
        quantizer.observe(weight)

    def ranges(self, parameters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Scale and zero point of every quantizer, weights' fitted to the weights as they are."""
        for name, path in self.sites.weights.values():
            self.fit_weight_(name, parameters[path])
        names = [*self.sites.activations, *(name for name, _ in self.sites.weights.values())]
        return {name: self[name].qparams() for name in names}

    def take_learned_weights_(self, other: FakeQuantization) -> None:
        """Go on with the learned weight ranges of `other`, where they have the same grid."""
        theirs = {name for name, _ in other.sites.weights.values()}
        for name, _ in self.sites.weights.values():
            if name in theirs and learns(self[name]) and self[name].grid == other[name].grid:
                self[name].load_state_dict(other[name].state_dict())
                self._begun.add(name)

    def get_extra_state(self) -> Tensor:
        """Which learned weight ranges have seen their weight, for the state dict."""
        return torch.tensor([name in self._begun for name in self._blank], dtype=torch.bool)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on as the saved one."""
        self._begun = {name for name, begun in zip(self._blank, state, strict=True) if begun}


def learns(quantizer: Quantizer) -> bool:
    """Whether its range is found by gradient."""
    return next(quantizer.parameters(), None) is not None


def _key(name: str) -> str:
    """A name that nn.ModuleDict accepts."""
    return name.replace(".", "/") or "root"


class Fixed(Quantizer):
    """A range that does not change: loaded from an artifact, or prescribed by the runtime."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("scale", torch.ones(grid.channels))
        self.register_buffer("zero_point", torch.zeros(grid.channels, dtype=torch.int32))

    def observe(self, x: Tensor) -> None:
        """Change nothing."""

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they were loaded."""
        return self.scale, self.zero_point


class _FakeMode(SiteMode):
    """Observes or rounds the tensors at the sites."""

    def __init__(self, model: nn.Module, fake: FakeQuantization) -> None:
        super().__init__(model, fake.sites)
        self.fake = fake
        self.rounds = fake.state == "quantize"
        self.follows = fake.follows and model.training
        self.infinite: set[str] | None = None  # where infinity was met, if that is asked

    def round(self, quantizer: str, x: Tensor) -> Tensor:
        if self.rounds:
            only = self.fake.only
            with blame_for("quantizer", self.fake[quantizer], f"rounding {quantizer}"):
                if self.follows:
                    self.fake[quantizer].observe(x.detach())
                return self.fake[quantizer](x) if only is None or quantizer in only else x
        if self.infinite is not None:
            if (
                x.is_floating_point()
                and x.isneginf().any()
                and not (x.isnan() | x.isposinf()).any()
            ):
                self.infinite.add(quantizer)
            return x
        if x.numel() and not torch.isfinite(torch.stack(x.detach().aminmax())).all():
            raise QuantizationError(
                f"at {quantizer} the model gives NaN or infinity in float; where that is meant, "
                "leave what makes it and what reads it in float (keep_float)"
            )
        with blame_for("quantizer", self.fake[quantizer], f"observing {quantizer}"):
            self.fake[quantizer].observe(x.detach())
        return x

    def has_constants(self, call: str) -> bool:
        return call in self.sites.weights

    def constants(
        self, call: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        name, only = self.sites.weights[call][0], self.fake.only
        if self.rounds and (only is None or name in only):
            weight = self.fake.weight(name, weight)
        return weight, bias


def _by_reason(sites: Sites) -> list[tuple[str, list[str]]]:
    """Calls that stay in float, by the reason."""
    found: dict[str, list[str]] = {}
    for call, reason in sites.skipped.items():
        found.setdefault(reason, []).append(call)
    return [*found.items()]


@torch.no_grad()
def _masks(
    fake: FakeQuantization, traced: Trace, model: nn.Module, inputs: tuple[Any, ...]
) -> set[str]:
    """The calls that would be rounded and make minus infinity, and those that read it.

    None where a layer with weights reads it: that is no mask but a model that has gone wrong.
    """
    mode = _FakeMode(model, fake)
    mode.infinite = set()
    with evaluating(model), mode:
        model(*fresh(inputs))
    if not mode.infinite:
        return set()
    readers = traced.readers()
    makers = {number: call for call in traced.calls for number in call.outputs}
    found: set[str] = set()
    for call in traced.calls:
        if fake.sites.outputs.get(call.name) in mode.infinite:
            found.update(r.name for number in call.outputs for r in readers.get(number, []))
            while call.op in fake.scheme.fuses and call.inputs and call.inputs[0] in makers:
                call = makers[call.inputs[0]]
                found.add(call.name)
            found.add(call.name)
        elif mode.infinite.intersection(fake.sites.inputs.get(call.name, {}).values()):
            found.add(call.name)
    layers = {call.name for call in traced.calls if call.op in WEIGHTED}
    return set() if found & layers else found


class QuantizedModel(nn.Module):
    """A float model whose forward simulates a backend's integers; what `quantize` returns.

    Args:
        model: the float model, a copy of its own.
        fake: its calibrated fake-quantizers.
        backend: name of the backend whose scheme they follow.
        choices: the quantizers of weights and activations, as a recipe writes them.
    """

    fake: FakeQuantization

    def __init__(
        self,
        model: nn.Module,
        fake: FakeQuantization,
        backend: str,
        choices: tuple[Choice, Choice] = ("minmax", "minmax"),
    ) -> None:
        super().__init__()
        self.choices = choices
        self.corrections: list[Any] = []  # what each correction did
        self.model = model
        self.fake = fake
        self.backend = backend

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives with rounded activations and weights."""
        with self.fake.active(self.model):
            return self.model(*args, **kwargs)
