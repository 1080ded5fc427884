"""Which batch-norms fold into the layer in front of them, and how.

With one free scale per output channel a batch-norm folds into integer weights exactly, by changing
the scales. Where scales must be powers of two it does not; `absorb_` then moves its factor into
the float weights before they are quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimkit.calls import Call, Trace
from slimkit.errors import QuantizationError

NOT_FOLDED = (
    "with scales that are powers of two, a batch-norm folds into the weights before these are "
    "quantized, as slimkit.quantize does"
)
_FOLDS_INTO = ("conv1d", "conv2d", "conv3d", "linear")


def foldable(traced: Trace) -> dict[str, Call]:
    """Layer call -> the batch-norm call that reads its output and nobody else does."""
    readers = traced.readers()
    found = {}
    for call in traced.calls:
        if call.op not in _FOLDS_INTO or call.weight_path is None:
            continue
        behind = readers.get(call.outputs[0], [])
        flat = call.op != "linear" or len(call.shape) == 2
        if len(behind) == 1 and call.outputs[0] not in traced.outputs and flat:
            (norm,) = behind
            if norm.op == "batch_norm" and _is_fixed(call, norm):
                found[call.name] = norm
    return found


def _is_fixed(layer: Call, norm: Call) -> bool:
    """Whether all that both compute with is in the model's state, and statistics are not new.

    What is computed on the way, such as ``weight.abs()`` for gamma, counts among the inputs.
    """
    statistics = ((1, "running_mean"), (2, "running_var"))
    fixed = all(position in norm.state or name in norm.state for position, name in statistics)
    fresh = norm.arguments.get(5, norm.arguments.get("training", False))
    return fixed and not fresh and len(layer.inputs) == len(norm.inputs) == 1


def affine(norm: Call, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Batch-norm in evaluation mode as y = factor * x + shift, each (channels,)."""

    def tensor(position: int, name: str) -> Tensor | None:
        path = norm.state.get(position, norm.state.get(name))
        return None if path is None else state[path].detach()

    mean, variance = tensor(1, "running_mean"), tensor(2, "running_var")
    assert mean is not None
    assert variance is not None
    gamma, beta = tensor(3, "weight"), tensor(4, "bias")
    eps = norm.arguments.get(7, norm.arguments.get("eps", 1e-5))
    factor = (1.0 if gamma is None else gamma) / (variance + eps).sqrt()
    return factor, (0.0 if beta is None else beta) - mean * factor


def spread(per_channel: Tensor, weight: Tensor) -> Tensor:
    """One value per output channel so that it broadcasts against `weight`."""
    return per_channel.view(-1, *[1] * (weight.dim() - 1))


@torch.no_grad()
def absorb_(model: nn.Module, traced: Trace) -> None:
    """Multiply each batch-norm's factor into the weights in front, and leave it a factor of 1.

    In evaluation mode the model computes what it did. Batch-norms keep their shift and their
    place, so that the state dict has the same names.

    Args:
        model: in evaluation mode; changed.
        traced: a forward of it.

    Raises:
        QuantizationError: a layer or a batch-norm serves several calls.
    """
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    calls = {call.name: call for call in traced.calls}
    pairs = foldable(traced)
    for name, norm in pairs.items():
        layer = calls[name]
        paths = {layer.weight_path, layer.bias_path, *norm.state.values()} - {None}
        users = [c.name for c in traced.calls if paths & set(c.state.values())]
        if users != [name, norm.name]:
            raise QuantizationError(
                f"{name}: {NOT_FOLDED}; here layer or batch-norm serve several calls "
                f"({', '.join(users)}): give each call its own"
            )
    for name, norm in pairs.items():
        layer = calls[name]
        factor, shift = affine(norm, state)
        state[layer.weight_path or ""].mul_(spread(factor, state[layer.weight_path or ""]))
        if layer.bias_path is not None:
            state[layer.bias_path].mul_(factor)
        _leave(norm, state, shift)


def _leave(norm: Call, state: dict[str, Tensor], shift: Tensor) -> None:
    """Make a batch-norm add `shift` and nothing else."""

    def tensor(position: int, name: str) -> Tensor | None:
        path = norm.state.get(position, norm.state.get(name))
        return None if path is None else state[path]

    mean, variance = tensor(1, "running_mean"), tensor(2, "running_var")
    assert mean is not None
    assert variance is not None
    gamma, beta = tensor(3, "weight"), tensor(4, "bias")
    variance.fill_(1 - norm.arguments.get(7, norm.arguments.get("eps", 1e-5)))
    if gamma is not None:
        gamma.fill_(1.0)
    if beta is None:
        mean.copy_(-shift)
    else:
        beta.copy_(shift)
        mean.zero_()
    factor, _ = affine(norm, state)
    if not torch.equal(factor, torch.ones_like(factor)):
        raise AssertionError("1 - eps + eps is 1 in float32, for any eps of at least 1e-9")


def refuse_unfolded(model: nn.Module, traced: Trace) -> None:
    """See that no batch-norm would change a scale.

    Raises:
        QuantizationError: one would.
    """
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, norm in foldable(traced).items():
        factor, _ = affine(norm, state)
        if not torch.equal(factor, torch.ones_like(factor)):
            raise QuantizationError(
                f"{name}: {NOT_FOLDED}. Quantization-aware training cannot do so while batch-norm "
                "learns: quantize after the training"
            )
