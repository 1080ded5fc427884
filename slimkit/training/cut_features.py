"""Which channels of a feature a cut leaves: found by trial on copies.

What a recipe names is any module, so no layer's weight says what the channels of its output are.
A copy of the dense network is given random weights, such that every channel varies with the input,
and the parameters of removed channels are set to zero: what still varies has stayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.batches import inputs_of, to_cpu
from slimkit.calls import map_tensors
from slimkit.errors import SlimkitError
from slimkit.evaluating import evaluating
from slimkit.places import Place
from slimkit.pruning.removal import Attributes, Kept, remove_
from slimkit.training.catching import catching
from slimkit.training.copies import own_copy

Cuts = dict[str, tuple[int, list[int]]]
"""Place to the dimension that a cut makes shorter, and the positions that remain."""

_SAMPLES = 16
_TRIES = 3


def kept_channels(
    dense: nn.Module,
    kept: Kept,
    attributes: Attributes,
    places: Sequence[Place],
    inputs: tuple[Any, ...],
) -> Cuts:
    """Where a cut leaves fewer channels: place to (dimension, positions that remain).

    Args:
        dense: the network before the cut; not changed.
        kept: what remains of each of its tensors.
        attributes: whole numbers in its modules that follow.
        places: whose channels are asked for.
        inputs: one sample.

    Raises:
        SlimkitError: they cannot be told.
    """
    probe = own_copy(dense).cpu().eval()
    cut = own_copy(probe)
    remove_(cut, kept, attributes)
    narrow = features(cut, places, _drawn(inputs, 0))
    found: dict[str, tuple[int, Tensor]] = {}
    for seed in range(_TRIES):
        _randomise_(probe, seed)
        _silence_(probe, kept)
        for text, wide in features(probe, places, _drawn(inputs, seed)).items():
            sizes = zip(wide.shape, narrow[text].shape, strict=True)
            dims = [dim for dim, (a, b) in enumerate(sizes) if a != b]
            if len(dims) == 1:
                rows = wide.movedim(dims[0], 0).flatten(1)
                varies = (rows != rows[:, :1]).any(1)
                if text in found:
                    varies |= found[text][1]
                found[text] = (dims[0], varies)
            elif dims:
                raise SlimkitError(f"at {text!r} the cut changes more than one dimension")
        unclear = [t for t, (dim, v) in found.items() if int(v.sum()) != narrow[t].shape[dim]]
        if not unclear:
            break
    else:  # a channel may be silent for the inputs of one try, but not of all
        raise SlimkitError(f"which channels the cut left at {unclear[0]!r} cannot be told")
    return {text: (dim, v.nonzero().flatten().tolist()) for text, (dim, v) in found.items()}


def since(earlier: Kept, now: Kept) -> Kept:
    """Positions in a network that was cut to `earlier` before, of those that are left `now`.

    Both count in the network as its function builds it.

    >>> since({"w": {0: [1, 3, 5]}}, {"w": {0: [1, 5], 1: [0]}})
    {'w': {0: [0, 2], 1: [0]}}
    """
    found: Kept = {}
    for name, dims in now.items():
        for dim, positions in dims.items():
            before = earlier.get(name, {}).get(dim)
            if before != positions:
                left = positions if before is None else [before.index(p) for p in positions]
                found.setdefault(name, {})[dim] = left
    return found


def features(
    network: nn.Module, places: Sequence[Place], inputs: tuple[Any, ...]
) -> dict[str, Tensor]:
    """What a network gives at each place in evaluation mode, without gradients."""
    moved = inputs_of((inputs,), network)
    with (
        evaluating(network),
        catching(network, places, "the student") as catch,
        torch.no_grad(),
    ):
        network(*moved)
    return {place.text: catch.tensor(place) for place in places}


def _drawn(inputs: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Several random samples of the same kind."""
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        shape = (_SAMPLES, *x.shape[1:]) if x.dim() else ()
        if x.is_floating_point() and x.dim():
            return torch.randn(shape, generator=generator).to(x.dtype)
        if x.dtype in (torch.int64, torch.int32) and x.dim():
            return torch.randint(int(x.max()) + 1, shape, generator=generator, dtype=x.dtype)
        return x.expand(shape).clone() if x.dim() else x

    return tuple(map_tensors(draw, x) for x in to_cpu(inputs))


@torch.no_grad()
def _randomise_(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            scale = parameter[0].numel() ** -0.5
            drawn = torch.randn(parameter.shape, generator=generator) * scale
        else:
            drawn = torch.rand(parameter.shape, generator=generator) + 0.5
        parameter.data = drawn.to(parameter.dtype)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.fill_(float(name.endswith("running_var")))


@torch.no_grad()
def _silence_(network: nn.Module, kept: Kept) -> None:
    """Zero what is not kept, in all parameters."""
    for name, parameter in network.named_parameters(remove_duplicate=False):
        for dim, positions in kept.get(name, {}).items():
            dead = torch.ones(parameter.shape[dim], dtype=torch.bool)
            dead[positions] = False
            parameter.data.index_fill_(dim, dead.nonzero().flatten(), 0.0)
