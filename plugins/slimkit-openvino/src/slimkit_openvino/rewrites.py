"""Rewrites of an OpenVINO model after which it computes on integers, and exactly as simulated.

OpenVINO reads the pair of ONNX operators that rounds a tensor as five nodes: FakeQuantize to the
integers as float, Convert to uint8, Convert to float32, Subtract the zero point, Multiply by the
scale. Its low precision transformations move the last three behind the operation that follows,
which then reads uint8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from openvino import Model, Node, Output
from openvino import opset13 as ops

_MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "StridedSlice"}
    | {"Slice", "Gather", "MaxPool", "ShuffleChannels", "Broadcast", "Tile"}
)
"""Operations whose outputs hold nothing but elements of their first input."""


@dataclass(frozen=True)
class _Rounding:
    """One rounding of a tensor to integers and back.

    Args:
        first: the FakeQuantize.
        last: the Multiply.
        scale: size of one step.
        zero_point: the integer that stands for 0.
        lowest: the smallest integer.
        highest: the largest integer.
    """

    first: Node
    last: Node
    scale: float
    zero_point: float
    lowest: float
    highest: float

    @property
    def grid(self) -> tuple[float, ...]:
        """Equal for roundings to the same numbers."""
        return self.scale, self.zero_point, self.lowest, self.highest


def keep_integers_(model: Model) -> None:
    """Leave out what rounds moved values to the grid that they are on already.

    It costs time where it keeps OpenVINO from knowing a pattern: a padding that belongs to the
    convolution behind it, or a reshape, transpose and reshape that shuffle channels.
    """
    made: dict[int, _Rounding] = {}  # id of the last node -> the rounding
    for rounding in _roundings(model):
        before = made.get(_source(rounding.first.input_value(0)).get_instance_id())
        if before is not None and before.grid == rounding.grid:
            rounding.last.output(0).replace(rounding.first.input_value(0))
        else:
            made[rounding.last.get_instance_id()] = rounding
    model.validate_nodes_and_infer_types()


def round_inputs_(model: Model) -> None:
    """Round the model's inputs in the order of operations in which slimkit rounds.

    FakeQuantize adds the zero point in front of the rounding, in float32. Values half-way between
    two integers then go elsewhere than with slimkit, which adds it behind. Inside a network such
    values are rare; images are full of them, as they were integers once (k / 127.5 - 1 on a grid
    of step 2 / 255 has no other). A Round in front leaves FakeQuantize nothing to decide.
    """
    for rounding in _roundings(model):
        x = rounding.first.input_value(0)
        if _source(x).get_type_name() != "Parameter":
            continue
        steps = ops.multiply(x, _number(np.float32(1) / np.float32(rounding.scale)))
        low, high = (_number(v - rounding.zero_point) for v in (rounding.lowest, rounding.highest))
        levels = round(rounding.highest - rounding.lowest) + 1
        exact = ops.fake_quantize(
            ops.round(steps, "half_to_even"),
            low,
            high,
            _number(rounding.lowest),
            _number(rounding.highest),
            levels,
        )
        rounding.first.output(0).replace(exact.output(0))
    model.validate_nodes_and_infer_types()


def clip_in_float_(model: Model) -> None:
    """Clip rounded values where they are float, by comparing.

    OpenVINO turns a Maximum and a Minimum behind a rounding into a clip of the integers, and rounds
    the bounds to them.
    """
    made = {rounding.last.get_instance_id() for rounding in _roundings(model)}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Maximum", "Minimum"):
            continue
        for n, bound in enumerate(node.input_values()):
            x = node.input_value(1 - n)
            if _is_constant(bound) and _source(x).get_instance_id() in made:
                outside = ops.less if node.get_type_name() == "Maximum" else ops.greater
                clipped = ops.select(outside(x, bound), bound, x)
                node.output(0).replace(clipped.output(0))
    model.validate_nodes_and_infer_types()


def fold_(model: Model) -> None:
    """Compute small constants now; the integers of weights stay integers.

    The ONNX reader leaves the shapes of biases and scales to be computed and subtracts zero points
    that are 0: 40 % of the file's text.
    """
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Subtract" and node.get_output_element_type(0).is_real():
            zeros = _constant(node.input_value(1))
            if zeros is not None and not zeros.any() and _keeps_shape(node):
                node.output(0).replace(node.input_value(0))
        elif kind == "Reshape":
            shape = list(node.get_output_shape(0))  # slimkit's programs have fixed shapes
            if _is_constant(node.input_value(0)):
                value = node.input_value(0).get_node().data
                folded = ops.constant(value.reshape(shape), value.dtype)
                node.output(0).replace(folded.output(0))
            elif 0 not in shape:  # it may mean: as the input
                fixed = ops.constant(np.array(shape, np.int64))
                node.input(1).replace_source_output(fixed.output(0))
        elif kind == "Convert" and _is_constant(node.input_value(0)):
            value = node.input_value(0).get_node().data
            if value.size == 1:
                folded = ops.constant(value, node.get_output_element_type(0))
                node.output(0).replace(folded.output(0))
    model.validate_nodes_and_infer_types()


def rename_(model: Model) -> None:
    """Number the nodes from 0, so that the same model gives the same file; keep its outer names."""
    model.set_friendly_name("slimkit")
    for n, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result"):
            node.set_friendly_name(f"{node.get_type_name()}_{n}")
    kept = {x.get_tensor().get_any_name() for x in model.outputs if x.get_tensor().get_names()}
    for node in model.get_ordered_ops():
        for output in node.outputs() if node.get_type_name() != "Parameter" else []:
            tensor = output.get_tensor()
            tensor.set_names(tensor.get_names() & kept)


def _roundings(model: Model) -> Iterator[_Rounding]:
    """All roundings of one scale, in order of execution."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        chain = _chain(node, ("Convert", "Convert", "Subtract", "Multiply"))
        bounds = [_constant(node.input_value(i)) for i in (3, 4)]
        if chain is None or any(b is None or b.size != 1 for b in bounds):
            continue
        zero_point, scale = (_constant(n.input_value(1)) for n in chain[2:])
        if zero_point is None or scale is None or zero_point.size * scale.size != 1:
            continue
        low, high = (float(b.item()) for b in bounds if b is not None)
        yield _Rounding(node, chain[-1], float(scale.item()), float(zero_point.item()), low, high)


def _chain(node: Node, kinds: tuple[str, ...]) -> list[Node] | None:
    """The nodes of these types behind `node`, each the only reader of the one in front of it."""
    found = []
    for kind in kinds:
        readers = list(node.output(0).get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() != kind:
            return None
        node = readers[0].get_node()
        found.append(node)
    return found


def _source(output: Output) -> Node:
    """What made the values that are moved to `output`, or padded with zeros."""
    while True:
        node = output.get_node()
        if not (node.get_type_name() in _MOVES or _pads_zeros(node) or _copies_pixels(node)):
            return node
        output = node.input_value(0)


def _pads_zeros(node: Node) -> bool:
    if node.get_type_name() != "Pad":
        return False
    if node.get_attributes()["pad_mode"] != "constant":
        return True
    fill = _constant(node.input_value(3)) if node.get_input_size() > 3 else np.zeros(1)
    return fill is not None and not fill.any()


def _copies_pixels(node: Node) -> bool:
    return node.get_type_name() == "Interpolate" and node.get_attributes()["mode"] == "nearest"


def _keeps_shape(node: Node) -> bool:
    return bool(node.get_input_partial_shape(0) == node.get_output_partial_shape(0))


def _is_constant(output: Output) -> bool:
    return bool(output.get_node().get_type_name() == "Constant")


def _constant(output: Output) -> np.ndarray | None:
    """The values of a constant, also where it is converted or reshaped."""
    node = output.get_node()
    while node.get_type_name() in ("Convert", "ConvertLike", "Reshape"):
        node = node.input_value(0).get_node()
    return np.asarray(node.data) if node.get_type_name() == "Constant" else None


def _number(value: float | np.floating[Any]) -> Any:
    return ops.constant(np.float32(value))
