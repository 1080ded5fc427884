"""The mode that rounds at the sites of a model; simulation and finished model differ in how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.calls import CallMode, map_tensors
from slimkit.quantization.sites import STEPS, Sites

INNER = {op: getattr(torch, function) for op, function in STEPS.items()}
"""The functions that operations of `STEPS` multiply their input with."""


class SiteMode(CallMode):
    """Meets the calls of `model` and rounds their inputs, constants and outputs.

    Args:
        model: whose calls.
        sites: where to round.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        super().__init__(model)
        self.sites = sites
        self._state = {id(t) for t in [*model.parameters(), *model.buffers()]}

    def round(self, quantizer: str, x: Tensor) -> Tensor:
        """What the activation quantizer makes of `x`."""
        raise NotImplementedError

    def has_constants(self, call: str) -> bool:
        """Whether weight and bias of this call are replaced."""
        raise NotImplementedError

    def constants(
        self, call: str, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the call computes with."""
        raise NotImplementedError

    def output(self, call: str) -> str | None:
        """The quantizer of what the call makes."""
        return self.sites.outputs.get(call)

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """Compute the call on rounded inputs and round its outputs."""
        reads = self.sites.inputs.get(name, {})
        if self.has_constants(name):
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            x, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)
            if 0 in reads:
                x = self._float_only(reads[0], x)
            args, kwargs = (x, *self.constants(name, weight, bias), *args[3:]), named
        elif reads:
            args, kwargs = self._rounded(reads, (args, kwargs))
        if name in self.sites.inner:
            x = args[0] if args else kwargs["input"]
            out: Any = x * self._float_only(self.sites.inner[name], INNER[op](x))
        else:
            out = func(*args, **kwargs)
        quantizer = self.output(name)
        if quantizer is None:
            return out
        return map_tensors(lambda t: self._float_only(quantizer, t), out)

    def _rounded(self, reads: dict[int, str], arguments: Any) -> Any:
        """Round the n-th tensor of the model among the arguments, for each n that has a site."""
        count = -1

        def one(t: Tensor) -> Tensor:
            nonlocal count
            if id(t) in self._state:  # parameters and buffers are not counted: see calls.Call
                return t
            count += 1
            return self._float_only(reads[count], t) if count in reads else t

        return map_tensors(one, arguments)

    def _float_only(self, quantizer: str, x: Tensor) -> Tensor:
        return self.round(quantizer, x) if x.is_floating_point() else x
