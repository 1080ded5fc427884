"""Finds layers with nothing but positively homogeneous functions between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimkit.calls import Call, Trace
from slimkit.quantization.corrections.places import Place

HOMOGENEOUS = frozenset(
    {"relu", "leaky_relu", "prelu", "contiguous", "clone", "detach", "dropout", "dropout2d"}
    | {f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)}
    | {f"adaptive_{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)}
    | {"interpolate", "pad", "identity", "feature_dropout"}
)
"""f(s x) = s f(x) for s > 0, channel by channel; shapes (N, C, ...) stay that."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads a scaled tensor.

    Args:
        place: the layer.
        first: which of its input channels is the tensor's first.
        repeat: how many neighbouring input features belong to one channel, behind a flattening.
    """

    place: Place
    first: int
    repeat: int


@dataclass(frozen=True)
class Pair:
    """A layer and all those that read its output, with homogeneous functions between."""

    front: Place
    behind: tuple[Reader, ...]


def pairs_of(traced: Trace, known: list[Place]) -> tuple[list[Pair], dict[str, str]]:
    """Every such pair, in order, and for the other layers of `known` why there is none."""
    by_call = {place.call.name: place for place in known}
    shapes = {number: call.shape for call in traced.calls for number in call.outputs}
    pairs, skipped = [], {}
    for place in known:
        reason = _obstacle(place)
        end = place.call if place.norm is None else place.norm
        walk = _Walk(traced, by_call, shapes)
        if not reason:
            axis = len(place.call.shape) + place.axis
            reason = walk.follow(end.outputs[0], axis, 0, 1)
        if reason:
            skipped[place.layer] = reason
        else:
            pairs.append(Pair(place, tuple(walk.found)))
    return pairs, skipped


def _obstacle(place: Place) -> str:
    if "transpose" in place.call.op:
        return "transposed convolutions are not scaled"
    if not place.once:
        return "its weights, bias or batch-norm serve several calls"
    if place.norm is not None and None in (place.of_norm(3, "weight"), place.of_norm(4, "bias")):
        return "its batch-norm has no gamma and beta to scale"
    return ""


class _Walk:
    """Follows a tensor to the layers that read it."""

    def __init__(
        self, traced: Trace, layers: dict[str, Place], shapes: dict[int, tuple[int, ...]]
    ) -> None:
        self.leaves = traced.outputs
        self.readers = traced.readers()
        self.layers = layers
        self.shapes = shapes
        self.found: list[Reader] = []

    def follow(self, number: int, axis: int, first: int, repeat: int) -> str:
        """Find the readers of a tensor; say what stands in the way, if anything does."""
        if number in self.leaves:
            return "the model gives its output"
        readers = self.readers.get(number, [])
        if not readers:
            return "nothing reads its output"
        for call in readers:
            reason = self._reader(call, number, axis, first, repeat)
            if reason:
                return reason
        return ""

    def _reader(self, call: Call, number: int, axis: int, first: int, repeat: int) -> str:
        shape = self.shapes[number]
        if call.name in self.layers:
            place = self.layers[call.name]
            expected = len(shape) - 1 if call.op == "linear" else len(shape) + place.axis
            if axis != expected:
                return f"{call.name} reads it along another dimension"
            if not place.once or "transpose" in call.op:
                return f"{call.name} is transposed or called several times"
            self.found.append(Reader(place, first, repeat))
            return ""
        if len(call.outputs) != 1:
            return f"{call.name} stands behind it"
        out, made = call.outputs[0], call.shape
        if call.op in HOMOGENEOUS:
            value = call.arguments.get("value", call.arguments.get(3))
            widened = call.op == "pad" and (value or made[: axis + 1] != shape[: axis + 1])
            if widened or len(made) != len(shape):
                return f"{call.name} stands behind it"
            return self.follow(out, axis, first, repeat)
        if call.op == "cat":
            dim = call.arguments.get("dim", call.arguments.get(1, 0))
            others = [self.shapes.get(n) for n in call.inputs]
            if dim % len(shape) != axis or None in others or call.inputs.count(number) != 1:
                return f"{call.name} stands behind it"
            at = call.inputs.index(number)
            skipped = sum(other[axis] for other in others[:at] if other is not None)
            return self.follow(out, axis, first + skipped, repeat)
        flat = (*shape[:axis], math.prod(shape[axis:]))
        if call.op in ("flatten", "reshape", "view") and made == flat:
            each = math.prod(shape[axis + 1 :])
            return self.follow(out, axis, first * each, repeat * each)
        if call.op == "mean" and made[: axis + 1] == shape[: axis + 1]:
            dims = call.arguments.get("dim", call.arguments.get(1))
            dims = [dims] if isinstance(dims, int) else dims
            if dims and all(d % len(shape) > axis for d in dims):
                return self.follow(out, axis, first, repeat)
        return f"{call.name} stands behind it"
