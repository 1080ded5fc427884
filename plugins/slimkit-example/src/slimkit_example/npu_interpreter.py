"""Runs the made-up NPU's steps: integers and shifts where it has them, else torch on the host."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
_MOVES = frozenset(
    {"aten.max_pool2d.default", "aten.flatten.using_ints", "aten.reshape.default"}
    | {"aten.view.default", "aten.transpose.int"}
)


@dataclass(frozen=True)
class Integers:
    """A tensor on the NPU: it stands for ``values * 2**exponent``.

    Args:
        values: int64, which holds the 8-bit values and the sums of their products.
        exponent: int64, of a shape that broadcasts to `values`.
    """

    values: Array
    exponent: Array

    def to_host(self) -> Tensor:
        """The numbers that it stands for, float32."""
        return torch.from_numpy(np.ldexp(self.values.astype(np.float64), self.exponent)).float()


class Interpreter:
    """The steps and constants of one file, ready to run.

    Args:
        graph: as `slimkit_example.npu_program.written` says.
        tensors: the constants by name.
    """

    def __init__(self, graph: dict[str, Any], tensors: dict[str, Array]) -> None:
        self.graph = graph
        self.constants = {name: torch.from_numpy(array) for name, array in tensors.items()}

    def zeros(self) -> list[Tensor]:
        """Inputs of the shapes that the file was made for."""
        return [
            torch.zeros(one["shape"], dtype=getattr(torch, one["type"].removeprefix("torch.")))
            for one in self.graph["inputs"]
        ]

    def run(self, inputs: Sequence[Tensor], counts: Counter[str] | None = None) -> list[Tensor]:
        """The outputs in order; `counts` is told which steps ran where."""
        names = [one["name"] for one in self.graph["inputs"]]
        values: dict[str, Any] = {**self.constants, **dict(zip(names, inputs, strict=True))}
        for step in self.graph["steps"]:
            args = [_given(a, values) for a in step["args"]]
            kwargs = {k: _given(a, values) for k, a in step["kwargs"].items()}
            made = _on_npu(step["op"], args) if not kwargs else None
            if counts is not None:
                short = step["op"].split(".")[1] if "." in step["op"] else step["op"]
                counts[f"{short} {'host' if made is None else 'int8'}"] += 1
            values[step["out"]] = _on_host(step["op"], args, kwargs) if made is None else made
        found = [values[name] for name in self.graph["outputs"]]
        return [v.to_host() if isinstance(v, Integers) else v.clone() for v in found]


def _given(argument: Any, values: dict[str, Any]) -> Any:
    if isinstance(argument, list):
        return [_given(one, values) for one in argument]
    if not isinstance(argument, dict):
        return argument
    if "ref" in argument:
        return values[argument["ref"]]
    return getattr(torch, argument["torch"]) if "torch" in argument else torch.device("cpu")


def _on_host(op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """One step by torch, on the numbers that integers stand for."""
    if op == "getitem":
        return operator.getitem(*args)
    function: Any = torch.ops
    for part in op.split("."):
        function = getattr(function, part)
    leave = lambda v: v.to_host() if isinstance(v, Integers) else v  # noqa: E731
    args, kwargs = torch.utils._pytree.tree_map(leave, (args, kwargs))
    return function(*args, **kwargs)


def _on_npu(op: str, args: list[Any]) -> Integers | None:
    """One step on integers, or None where the NPU has no such step."""
    if op == "quantized_decomposed.quantize_per_tensor.default":
        x, scale, _, low, high, _ = args
        return quantized(x, int(np.frexp(scale)[1]) - 1, low, high)
    if op == "quantized_decomposed.dequantize_per_tensor.default":
        return args[0]  # the next step reads integers, or takes them to the host
    if op == "quantized_decomposed.dequantize_per_channel.default":
        q, scale, _, axis, *_ = args
        shape = [len(scale) if d == axis else 1 for d in range(q.dim())]
        return Integers(q.numpy().astype(np.int64), _exponents(scale).reshape(shape))
    operation = OPERATIONS.get(op)
    if operation is not None:
        return operation(*args)
    if op in _MOVES and isinstance(args[0], Integers) and not args[0].exponent.ndim:
        moved = _on_host(op, [torch.from_numpy(args[0].values.astype(np.float64)), *args[1:]], {})
        return Integers(moved.numpy().astype(np.int64), args[0].exponent)
    return None


def quantized(x: Integers | Tensor, exponent: int, low: int, high: int) -> Integers:
    """Integers of one exponent, rounded half to even and clipped."""
    if isinstance(x, Integers):
        q = shifted(x.values, x.exponent - exponent)
    else:
        q = np.rint(np.ldexp(x.float().numpy(), -exponent)).clip(low, high).astype(np.int64)
    return Integers(q.clip(low, high), np.array(exponent))


def shifted(values: Array, by: Array) -> Array:
    """``values * 2**by`` in integers; to the right it rounds half to even."""
    right = np.clip(-by, 0, 62)
    floor = values >> right
    rest, half = values - (floor << right), (np.int64(1) << right) >> 1
    up = (right > 0) & ((rest > half) | ((rest == half) & (floor & 1 == 1)))
    return np.where(by > 0, values << np.clip(by, 0, 62), floor + up)


def conv2d(
    x: Any,
    w: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Integers | None:
    """Sums of products of 8-bit integers; a scale of each output channel remains."""
    if not (isinstance(x, Integers) and isinstance(w, Integers)):
        return None
    (n, channels), (out, _, *kernel) = x.values.shape[:2], w.values.shape
    rims = [(p, p) for p in padding]
    image = np.pad(x.values.astype(np.float64), [(0, 0), (0, 0), *rims])  # holds sums to 2**53
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(image, reach, (2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    windows = windows.reshape(n, groups, channels // groups, *windows.shape[2:])
    kernels = w.values.astype(np.float64).reshape(groups, out // groups, -1, *kernel)
    sums = np.einsum("ngcyxij,gocij->ngoyx", windows, kernels, optimize=True)
    values = sums.reshape(n, out, *sums.shape[3:]).astype(np.int64)
    return _biased(values, x.exponent + w.exponent.reshape(1, -1, 1, 1), bias)


def linear(x: Any, w: Any, bias: Any = None) -> Integers | None:
    """The same for a matrix."""
    if not (isinstance(x, Integers) and isinstance(w, Integers)):
        return None
    values = (x.values.astype(np.float64) @ w.values.T.astype(np.float64)).astype(np.int64)
    return _biased(values, x.exponent + w.exponent.reshape(-1), bias)


def _biased(values: Array, exponent: Array, bias: Any) -> Integers:
    """With a 32-bit bias, which has the exponent of the sums."""
    if bias is None:
        return Integers(values, exponent)
    assert isinstance(bias, Integers)
    return Integers(values + bias.values.reshape(exponent.shape), exponent)


def add(a: Any, b: Any) -> Integers | None:
    """The sum at the smaller of both exponents."""
    if not (isinstance(a, Integers) and isinstance(b, Integers)) or a.exponent.ndim:
        return None
    least = np.minimum(a.exponent, b.exponent)
    if max(a.exponent, b.exponent) - least > 40:
        return None  # too wide for the adder
    values = shifted(a.values, a.exponent - least) + shifted(b.values, b.exponent - least)
    return Integers(values, least)


def relu(x: Any) -> Integers | None:
    """No value below 0."""
    return Integers(x.values.clip(min=0), x.exponent) if isinstance(x, Integers) else None


def relu6(x: Any) -> Integers | None:
    """No value below 0 or above 6, where 6 is an integer of the tensor's."""
    if not isinstance(x, Integers) or (x.exponent > 1).any():
        return None
    return Integers(np.clip(x.values, 0, shifted(np.array(6), -x.exponent)), x.exponent)


def _exponents(scale: Tensor) -> Array:
    """Of scales that are powers of two."""
    return np.frexp(scale.numpy())[1].astype(np.int64) - 1


OPERATIONS: dict[str, Callable[..., Integers | None]] = {
    "aten.conv2d.default": conv2d,
    "aten.linear.default": linear,
    "aten.add.Tensor": add,
    "aten.add_.Tensor": add,
    "aten.relu.default": relu,
    "aten.relu_.default": relu,
    "aten.relu6.default": relu6,
}
"""What the NPU computes, on integers; None sends a step to the host."""
