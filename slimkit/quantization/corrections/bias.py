"""Bias correction: takes back the error that rounding leaves in the mean of each channel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from slimkit.calls import Call, trace
from slimkit.quantization.corrections.beside import Meet, beside
from slimkit.quantization.corrections.places import Place, rounded_places
from slimkit.quantization.fake import FakeQuantization


def bias_(
    model: nn.Module, reference: nn.Module, fake: FakeQuantization, inputs: tuple[Any, ...]
) -> dict[str, str]:
    """Shift each channel of `model` so that rounding leaves its mean where it is in float.

    Layers are shifted in order, each on what the rounded and already shifted ones in front of it
    give. The shift goes into the batch-norm behind a layer where there is one, else into its bias.

    Nagel et al. 2019, Data-Free Quantization, https://arxiv.org/abs/1906.04721; means are measured
    on data, not derived from batch-norms.

    Args:
        model: changed.
        reference: the same model in float.
        fake: rounds.
        inputs: the forward's arguments, one batch.

    Returns:
        Layer -> why it was left out.
    """
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    skipped: dict[str, str] = {}
    shifts: dict[str, tuple[Shift, int]] = {}
    ends: list[Call] = []
    for place in rounded_places(trace(model, inputs), fake.sites):
        shift = _shift(place, state)
        if isinstance(shift, str):
            skipped[place.layer] = shift
            continue
        shifts[place.end] = shift, place.axis
        ends.append(place.call if place.norm is None else place.norm)

    def mean(call: Call, out: Tensor) -> Tensor:
        return _mean(out, shifts[call.name][1])

    def shifted(call: Call, wanted: Tensor) -> Meet:
        shift = shifts[call.name][0]

        def meet(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            shift(wanted - mean(call, func(*args, **kwargs)))
            return func(*args, **kwargs)  # reads the tensor that was shifted

        return meet

    beside(model, reference, fake, inputs, ends, shifted, mean)
    return skipped


Shift = Callable[[Tensor], None]


def _shift(place: Place, state: dict[str, Tensor]) -> Shift | str:
    """What adds one value a channel to the layer's output; or why nothing can."""
    if not place.once:
        return "its weights, bias or batch-norm serve several calls"
    path = place.bias if place.norm is None else place.of_norm(4, "bias")
    if path is not None:
        return partial(_add_, state[path])
    if place.norm is None:
        return "it has neither bias nor batch-norm"
    mean_path, variance_path = place.of_norm(1, "running_mean"), place.of_norm(2, "running_var")
    gamma_path = place.of_norm(3, "weight")
    assert mean_path is not None
    assert variance_path is not None
    mean, variance = state[mean_path], state[variance_path]
    eps = place.norm.arguments.get(7, place.norm.arguments.get("eps", 1e-5))
    slope = (variance + eps).rsqrt() * (1.0 if gamma_path is None else state[gamma_path].detach())
    if (slope == 0).any():
        return "its batch-norm has no bias and a channel of slope 0"
    return lambda by: _add_(mean, -by / slope)


def _add_(tensor: Tensor, by: Tensor) -> None:
    tensor.data.add_(by.to(tensor.dtype))


def _mean(x: Tensor, axis: int) -> Tensor:
    """The mean of each channel, (channels,)."""
    return x.float().movedim(axis, 0).flatten(1).mean(1)
