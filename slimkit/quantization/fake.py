"""The fake-quantizers of a model, and the mode that puts them into its operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimkit.calls import trace
from slimkit.errors import QuantizationError
from slimkit.interfaces import Grid, Quantizer, Scheme
from slimkit.quantization.mode import SiteMode
from slimkit.quantization.sites import Sites, find_sites

Maker = Callable[[Grid], Quantizer]
State = Literal["float", "observe", "quantize"]
Choice = str | Mapping[str, Any]
"""A quantizer's name, or ``{"name": ..., "options": {...}}``."""


class FakeQuantization(nn.Module):
    """Simulates a backend's integer arithmetic in a float model.

    The quantizers are this module's children, so ranges are saved and moved with it; the model
    itself is not changed and not owned. Weight ranges follow the weights at every forward;
    activation ranges are those of the calibration.

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
        self.quantizers = nn.ModuleDict()
        for name in sites.activations:
            self.quantizers[_key(name)] = activations(scheme.activations)
        self._blank: dict[str, dict[str, Tensor]] = {}
        for call, (name, path) in sites.weights.items():
            axis = 1 if "conv_transpose" in call else 0
            quantizer = weights(scheme.weights.sized(parameters[path], axis))
            self.quantizers[_key(name)] = quantizer
            self._blank[name] = {k: b.clone() for k, b in quantizer.named_buffers()}
        self.to(next(iter(parameters.values())).device)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        scheme: Scheme,
        weights: Maker,
        activations: Maker,
        keep_float: Sequence[str] = (),
    ) -> FakeQuantization:
        """Trace `model` once on `example_inputs` and place the quantizers that `scheme` asks for.

        Args:
            model: the float model; not changed.
            example_inputs: the forward's arguments.
            scheme: the backend's arithmetic.
            weights: makes a quantizer for a weight's grid.
            activations: makes a quantizer for an activation's grid.
            keep_float: patterns of modules or calls that stay in float.

        Raises:
            QuantizationError: the backend could compute nothing of this model in integers.
        """
        sites = find_sites(trace(model, example_inputs), scheme, keep_float)
        if not sites.weights and not sites.activations:
            why = [f"{call}: {reason}" for call, reason in list(sites.skipped.items())[:5]]
            wanted = ", ".join(sorted(scheme.operations))
            raise QuantizationError(
                f"nothing of {type(model).__name__} would be quantized: it calls none of the "
                "operations that the backend computes in integers "
                + "; ".join([f"({wanted})", *why])
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(sites, scheme, weights, activations, parameters)

    def __getitem__(self, name: str) -> Quantizer:
        """The quantizer called `name` in `sites`."""
        return self.quantizers[_key(name)]  # type: ignore[return-value]

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """Inside, forwards of `model` (and of its submodules) go through the fake-quantizers."""
        if self.state == "float":
            yield
            return
        with _FakeMode(model, self):
            yield

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """Fake-quantize a weight over its present range."""
        self.fit_weight_(name, weight)
        return self[name](weight)

    @torch.no_grad()
    def fit_weight_(self, name: str, weight: Tensor) -> None:
        """Forget the range of the weight quantizer `name` and observe `weight` afresh."""
        quantizer = self[name]
        if isinstance(quantizer, Fixed):
            return
        for key, buffer in quantizer.named_buffers():
            buffer.copy_(self._blank[name][key])
        quantizer.observe(weight)


def _key(name: str) -> str:
    """A name that nn.ModuleDict accepts."""
    return name.replace(".", "/") or "root"


class Fixed(Quantizer):
    """A range that was found before and no longer changes, as loaded from an artifact."""

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

    def round(self, quantizer: str, x: Tensor) -> Tensor:
        if self.rounds:
            return self.fake[quantizer](x)
        if not torch.isfinite(x).all():
            raise QuantizationError(f"at {quantizer} the model gives NaN or infinity in float")
        self.fake[quantizer].observe(x.detach())
        return x

    def has_constants(self, call: str) -> bool:
        return call in self.sites.weights

    def constants(
        self, call: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.rounds:
            weight = self.fake.weight(self.sites.weights[call][0], weight)
        return weight, bias


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
        self.model = model
        self.fake = fake
        self.backend = backend

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives with rounded activations and weights."""
        with self.fake.active(self.model):
            return self.model(*args, **kwargs)
