"""Moves roundings forward past what only moves or clips values, to where the values are made.

The converter writes a rounding as QUANTIZE and DEQUANTIZE. A layer computes on integers where its
output is rounded right behind it; a clip or a transpose in between hides that. Rounding first and
moving or clipping the integers gives the same integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit_litert.graph import Graph, Step

LOW, HIGH = -128, 127
MOVES: dict[str, int] = {
    "RESHAPE": 0,
    "TRANSPOSE": 0,
    "SQUEEZE": 0,
    "EXPAND_DIMS": 0,
    "SLICE": 0,
    "STRIDED_SLICE": 0,
    "SPLIT": 1,
    "SPLIT_V": 0,
    "UNPACK": 0,
    "GATHER": 0,
    "PAD": 0,
    "MIRROR_PAD": 0,
    "BROADCAST_TO": 0,
    "TILE": 0,
    "REVERSE_V2": 0,
    "SPACE_TO_DEPTH": 0,
    "DEPTH_TO_SPACE": 0,
    "SPACE_TO_BATCH_ND": 0,
    "BATCH_TO_SPACE_ND": 0,
    "RESIZE_NEAREST_NEIGHBOR": 0,
    "MAX_POOL_2D": 0,
}
"""Operators that give nothing but elements of one input and zeros: name to that input's place."""

_CLIPS: dict[str, tuple[float, float]] = {
    "RELU": (0.0, np.inf),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
    "RELU_0_TO_1": (0.0, 1.0),
}


def is_plain(operator: Any) -> bool:
    """Whether no activation is fused into it."""
    return not getattr(operator.builtinOptions, "fusedActivationFunction", 0)


def integers(values: np.ndarray, step: Step) -> np.ndarray:
    """The int8 values that the runtime rounds `values` to."""
    scaled = np.asarray(values, np.float32) * (np.float32(1) / np.float32(step.size))
    # in front of the addition, as infinity is cut off as well
    rounded = np.clip(np.rint(scaled), LOW - step.zero, HIGH - step.zero) + step.zero
    return rounded.astype(np.int8)


def advance_(graph: Graph) -> None:
    """Move every rounding as far forward as its integers stay the same."""
    for rounding in [o for o in reversed(graph.operators) if graph.kind(o) == "QUANTIZE"]:
        if rounding in graph.operators:
            while _moved_forward(graph, rounding):
                pass
    graph.drop_unread()


def _moved_forward(graph: Graph, rounding: Any) -> bool:
    """Swap `rounding` with the operator in front of it, if that may be; whether it was."""
    x, rounded = rounding.inputs[0], rounding.outputs[0]
    step = graph.step(rounded)
    before = graph.makers().get(x)
    if before is None or step is None or not graph.is_float(x) or not _only_rounded(graph, x, step):
        return False
    kind = graph.kind(before)
    clip = clip_of(graph, before)
    if not (clip is not None or (kind in MOVES and is_plain(before) and len(before.outputs) == 1)):
        return False
    place = 0 if clip is not None else MOVES[kind]
    source = before.inputs[place]
    if clip is not None and graph.constant(source) is not None:
        place = 1 - place
        source = before.inputs[place]
    if graph.constant(source) is not None:
        return False
    for other in [o for o in graph.readers()[x] if o is not rounding]:  # rounded alike
        graph.operators.remove(other)
        graph.replace(other.outputs[0], rounded)
    position = graph.operators.index(before)
    graph.operators.remove(rounding)
    graph.operators.remove(before)
    rounding.inputs = [source]
    rounding.outputs = [graph.like(source, step)]
    behind = _on_integers(graph, before, place, clip, rounding.outputs[0], rounded, step)
    graph.operators[position:position] = [rounding, *behind]
    if not behind:
        graph.replace(rounded, rounding.outputs[0])
    return True


def _only_rounded(graph: Graph, tensor: int, step: Step) -> bool:
    """Whether nobody reads the tensor but roundings to one grid."""
    readers = graph.readers()[tensor]
    inside = tensor not in graph.graph.outputs
    return inside and all(
        graph.kind(o) == "QUANTIZE" and graph.step(o.outputs[0]) == step for o in readers
    )


def clip_of(graph: Graph, operator: Any) -> tuple[float, float] | None:
    """The bounds of an operator that does nothing but clip."""
    kind = graph.kind(operator)
    if kind in ("MAXIMUM", "MINIMUM"):
        for tensor in operator.inputs:
            bound = graph.constant(tensor)
            if bound is not None and bound.size == 1:
                value = float(bound.item())
                return (value, np.inf) if kind == "MAXIMUM" else (-np.inf, value)
    return _CLIPS.get(kind)


def _on_integers(
    graph: Graph,
    operator: Any,
    place: int,
    clip: tuple[float, float] | None,
    source: int,
    target: int,
    step: Step,
) -> list[Any]:
    """The operators that do to the integers `source` what `operator` does to numbers."""
    if clip is None:
        operator.inputs = [source if n == place else t for n, t in enumerate(operator.inputs)]
        operator.outputs = [target]
        return [operator]
    bounds = integers(np.array(clip), step)
    made = []
    for kind, bound, end in (("MAXIMUM", bounds[0], LOW), ("MINIMUM", bounds[1], HIGH)):
        if bound != end:  # else no integer lies beyond it
            values = np.array([bound], np.int8)
            constant = graph.add([1], np.int8, [step.size], [step.zero], values=values)
            made.append(graph.new(kind, [source, constant], [graph.like(source, step)]))
            source = made[-1].outputs[0]
    if made:
        made[-1].outputs = [target]
    return made
