"""What every function that takes a model asks of it first."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimkit.batches import fresh, samples_in, samples_of
from slimkit.errors import SlimkitError, in_one_line
from slimkit.evaluating import evaluating
from slimkit.interfaces import tensors_of

_NEAR = 0.01  # of an output's largest value: far more than the order of sums makes


def check_module(model: object, caller: str) -> None:
    """Refuse what is no network.

    Raises:
        SlimkitError: it is something else, such as the class, a state dict or a path.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise SlimkitError(f"{caller} takes a model, not its class: call {model.__name__}(...)")
    raise SlimkitError(
        f"{caller} takes an nn.Module, not {type(model).__name__}: build the model and load its "
        "weights first"
    )


def check_single(model: nn.Module) -> None:
    """Refuse weights of another floating-point type than float32, which files are made of.

    Raises:
        SlimkitError: the first such parameter, and the way out.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise SlimkitError(
                f"{name} of the model is in {kind}: integers and files are made of float32; call "
                "model.float() first, and give inputs in float32"
            )


@torch.no_grad()
def check_repeats(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a model that gives something else each time it runs in evaluation mode.

    No two of its forwards can be compared, so neither a cut nor a file can be verified. A model
    that does not run passes: others say why.

    Raises:
        SlimkitError: it does.
    """
    state = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with evaluating(model), torch.random.fork_rng(devices=_cuda_of(inputs)):
            once, again = (tensors_of(model(*fresh(inputs))) for _ in range(2))
    except Exception:  # whatever a model raises
        return
    finally:
        for buffer, before in state:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
    for a, b in zip(once, again, strict=False):
        if a.shape != b.shape or not a.is_floating_point() or not a.numel():
            continue
        largest = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
        if not torch.isclose(a, b, rtol=0, atol=1e-5 + _NEAR * largest, equal_nan=True).all():
            raise SlimkitError(
                f"{type(model).__name__} gives something else each time it runs in evaluation "
                "mode, so nothing made of it can be verified: it draws random numbers (F.dropout "
                "without training=self.training, randn_like, noise), or keeps something from one "
                "run for the next. Let it draw only where self.training, or take the noise or the "
                "state as an input"
            )


def _cuda_of(inputs: tuple[Any, ...]) -> list[torch.device]:
    return list({t.device for t in tensors_of(inputs) if t.device.type == "cuda"})


@torch.no_grad()
def check_samples(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a model that is random, or computes something else of a sample alone than of two.

    Files take one sample, and dimension 0 counts them. Recurrent networks that have time there,
    and models that compare samples of a batch, would become files of something else.

    Args:
        model: in float; run in evaluation mode, where `inputs` hold two samples or more.
        inputs: the forward's arguments.

    Raises:
        SlimkitError: it does.
    """
    check_repeats(model, samples_of(inputs, 0, 1))
    if samples_in(inputs) < 2:
        return
    try:
        with evaluating(model):
            both = tensors_of(model(*fresh(samples_of(inputs, 0, 2))))
            second = tensors_of(model(*fresh(samples_of(inputs, 1, 2))))
    except SlimkitError:
        raise
    except Exception as error:  # whatever a model raises
        raise SlimkitError(
            f"{type(model).__name__} does not run on one sample and on two of the inputs "
            f"({in_one_line(error)}): dimension 0 of each must count samples"
        ) from error
    for number, (a, b) in enumerate(zip(both, second, strict=False)):
        if not (a.is_floating_point() and b.numel()):
            continue
        together = a.shape == b.shape  # no dimension of samples: the same of any, or of all
        if not (together or (a.dim() and len(a) == 2 and a[1:].shape == b.shape)):
            continue
        apart = ((a if together else a[1:]) - b).abs()
        if not float(apart.max()) > 1e-5 + _NEAR * float(a.abs().max()):
            continue
        if together:
            raise SlimkitError(
                f"output {number} of {type(model).__name__} is computed over all samples together: "
                "files take one sample. Return it in training only (if self.training), or give it "
                "a dimension 0 that counts samples"
            )
        raise SlimkitError(
            f"{type(model).__name__} computes something else of a sample alone than of two "
            f"together (output {number}): files take one sample, and dimension 0 of each input "
            "counts them. Give a model with time in dimension 1 (batch_first=True), or inputs of "
            "one sample each"
        )
