"""Cross-layer equalization: moves size between channels so that one range suits them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.calls import trace
from slimkit.interfaces import tensors_of
from slimkit.quantization.corrections.beside import Meet, run
from slimkit.quantization.corrections.pairs import Pair, Reader, pairs_of
from slimkit.quantization.corrections.places import Place, places
from slimkit.quantization.fake import FakeQuantization

SHARES = (0.25, 0.5, 0.75, 1.0)
"""How much of the evening out the activations get; the weights behind them get the rest."""

MOST = 1e3
"""No channel is scaled by more."""

ALIKE = 1e-3
"""How far an output in float may move, as a share of its largest value."""


def equalize_(model: nn.Module, fake: FakeQuantization, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Divide channels in front of a positively homogeneous function and multiply them behind it.

    The divisors are ``a**p / w**(1 - p)``, where a is a channel's largest activation and w its
    largest weight in the layers behind, with that p of `SHARES` which promises the least noise
    behind them; none where that is no less than now. Outputs in float stay within `ALIKE`, or
    everything is put back.

    Nagel et al. 2019, Data-Free Quantization, https://arxiv.org/abs/1906.04721, section 4.1; they
    have the weights' range in front in the place of a, and p = 1/2. That is kept where the weights
    in front share one scale. Where each channel has its own, or a batch-norm behind it, the range
    of those weights costs nothing, and what the channels do share is the activation's.

    Args:
        model: changed: weights, biases, gamma and beta of batch-norms.
        fake: whose grids; its activation ranges no longer fit afterwards.
        inputs: the forward's arguments, one batch.

    Returns:
        Layer -> why it was not scaled.
    """
    traced = trace(model, inputs)
    pairs, skipped = pairs_of(traced, places(traced))
    before = _outputs(model, inputs)
    saved = [p.detach().clone() for p in model.parameters()]
    reads = _sizes(model, inputs, [reader.place for pair in pairs for reader in pair.behind])
    for pair in pairs:
        if not _scale_(model, pair, fake, reads):
            skipped[pair.front.layer] = "its channels are as even as they can be"
    after = _outputs(model, inputs)
    if all(
        (x - y).abs().max() <= ALIKE * x.abs().max() for x, y in zip(before, after, strict=True)
    ):
        learned = fake.get_extra_state()
        fake.set_extra_state(torch.zeros_like(learned))  # ranges of weights that are no more
        return skipped
    for parameter, values in zip(model.parameters(), saved, strict=True):
        parameter.data.copy_(values)
    return {pair.front.layer: "the outputs in float would not stay the same" for pair in pairs}


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    out = run(model, inputs, {}, whole=True)
    return [t for t in tensors_of(out) if t.is_floating_point() and t.numel()]


def _sizes(
    model: nn.Module, inputs: tuple[Any, ...], behind: list[Place]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Largest absolute value and mean square of each input channel of some layers, by call."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def sized(place: Place) -> Meet:
        def meet(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["input"]
            rows = x.float().movedim(place.axis, 0).flatten(1)
            found[place.call.name] = (rows.abs().amax(1), rows.square().mean(1))
            return func(*args, **kwargs)

        return meet

    if behind:
        run(model, inputs, {place.call.name: sized(place) for place in behind})
    return found


@torch.no_grad()
def _scale_(
    model: nn.Module, pair: Pair, fake: FakeQuantization, reads: dict[str, tuple[Tensor, Tensor]]
) -> bool:
    """Scale one pair by the best divisors; whether any are better than none."""
    front = pair.front
    weight = model.get_parameter(front.weight)
    channels = len(weight)
    readers = [_Behind(model, reader, channels, fake, reads) for reader in pair.behind]
    largest = torch.stack([r.channels(r.largest) for r in readers]).amax(0)
    columns = torch.stack([r.channels(r.columns) for r in readers]).amax(0)
    if front.norm is None and not fake.scheme.weights.per_channel:
        largest = weight.abs().flatten(1).amax(1)
    alive = (largest > 0) & (columns > 0)
    if not alive.any():
        return False
    best = torch.ones_like(largest)
    least = sum(r.noise(best) for r in readers)
    for share in SHARES:
        s = torch.where(alive, largest**share / columns ** (1 - share), torch.ones_like(largest))
        s = s * ((largest / s)[alive].max() / largest.max())
        s = torch.where(alive, s.clamp(1 / MOST, MOST), torch.ones_like(s))
        noise = sum(r.noise(s) for r in readers)
        if noise < least:
            best, least = s, noise
    if (best == 1).all():
        return False
    if front.norm is not None:
        scaled = [front.of_norm(3, "weight"), front.of_norm(4, "bias")]
    else:
        scaled = [front.weight, front.bias]
    for path in scaled:
        if path is not None:
            parameter = model.get_parameter(path)
            parameter.data.div_(best.view(-1, *[1] * (parameter.dim() - 1)))
    for reader in readers:
        reader.multiply_(best)
    return True


class _Behind:
    """One layer that reads the scaled channels."""

    def __init__(
        self,
        model: nn.Module,
        reader: Reader,
        channels: int,
        fake: FakeQuantization,
        reads: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        call = reader.place.call
        self.largest, self.square = reads[call.name]  # (in,) each
        self.weight = model.get_parameter(reader.place.weight)
        self.groups = len(self.largest) // self.weight.shape[1]
        self.count = channels * reader.repeat
        self.reader = reader
        self.scheme = fake.scheme
        self.rounded = call.name in fake.sites.weights
        tiled = (
            self.weight.detach()
            .float()
            .reshape(self.groups, -1, *self.weight.shape[1:2], self._taps)
        )
        self.reach = tiled.abs().amax(3)  # (groups, out / groups, in / groups)
        self.energy = tiled.square().sum((1, 3)).flatten()  # (in,)
        self.columns = self.reach.amax(1).flatten()  # (in,)

    @property
    def _taps(self) -> int:
        return self.weight[0, 0].numel()

    def channels(self, of_inputs: Tensor) -> Tensor:
        """The largest value among the inputs that belong to each scaled channel."""
        own = of_inputs[self.reader.first : self.reader.first + self.count]
        return own.view(-1, self.reader.repeat).amax(1)

    def spread(self, s: Tensor) -> Tensor:
        """One factor for every input: s for those that are scaled, 1 for the others."""
        factors = torch.ones_like(self.largest)
        own = s.repeat_interleave(self.reader.repeat)
        factors[self.reader.first : self.reader.first + self.count] = own
        return factors

    def noise(self, s: Tensor) -> float:
        """What rounding adds to the layer's outputs, as a share of their power, up to a factor."""
        if not self.rounded:
            return 0.0
        f = self.spread(s)
        step = (self.largest / f).max() / (self.scheme.activations.qmax)
        of_inputs = step.square() * (f.square() * self.energy).sum()
        reach = (self.reach * f.view(self.groups, 1, -1)).amax(2)  # (groups, out / groups)
        if not self.scheme.weights.per_channel:
            reach = reach.max().expand_as(reach)
        steps = (reach / self.scheme.weights.qmax).square().sum(1)
        power = (self.square / f.square()).view(self.groups, -1).sum(1) * self._taps
        signal = (self.energy * self.square).sum().clamp(min=torch.finfo(torch.float32).tiny)
        return float((of_inputs + (steps * power).sum()) / signal)

    def multiply_(self, s: Tensor) -> None:
        """Multiply the weights of the scaled channels."""
        f = self.spread(s).view(self.groups, 1, -1, 1)
        shaped = self.weight.data.reshape(self.groups, -1, self.weight.shape[1], self._taps) * f
        self.weight.data.copy_(shaped.reshape(self.weight.shape))
