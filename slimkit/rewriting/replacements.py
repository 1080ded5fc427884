"""What takes the place of an operation call, by the name under which artifacts keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

Notes = dict[int, tuple[Tensor, Tensor]]
"""id of an output -> (that output, the input it was made of), within one forward of a module."""

Replacement = Callable[[Notes, Callable[..., Any], Any, Any], Any]
"""Takes the notes, and function, arguments and named arguments of the call; gives its result."""


def _input(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["input"]


def _in_place(func: Callable[..., Any], kwargs: Any, args: Any = ()) -> bool:
    """Whether the call writes its result into its input."""
    name = func.__name__
    if name.endswith("_") and not name.endswith("__"):
        return True
    return name == "__imul__" or bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))


def _hardswish(_notes: Notes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return functional.hardswish(_input(args, kwargs), _in_place(func, kwargs, args))


def _hardsigmoid(_notes: Notes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return functional.hardsigmoid(_input(args, kwargs), _in_place(func, kwargs))


def _gelu_tanh(_notes: Notes, _func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return functional.gelu(_input(args, kwargs), approximate="tanh")


def _same(_notes: Notes, _func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return _input(args, kwargs)


def _noted(notes: Notes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Compute the sigmoid, and remember of what."""
    x, out = _input(args, kwargs), func(*args, **kwargs)
    if out is not x:
        notes[id(out)] = out, x
    return out


def _gated(notes: Notes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Compute x * sigmoid(x), written out, as the one function."""
    if len(args) == 2:
        for gate, x in (args, args[::-1]):
            if id(gate) in notes and notes[id(gate)][1] is x:
                return functional.hardswish(x, _in_place(func, {}) and args[0] is x)
    return func(*args, **kwargs)


def windows(size: int, out: int) -> tuple[int, int] | None:
    """Kernel and stride with which pooling does what adaptive pooling does; None if nothing does.

    Adaptive pooling takes its i-th value from position floor(i size / out) to the one before
    ceil((i + 1) size / out).

    >>> windows(14, 7), windows(3, 2), windows(7, 4)
    ((2, 2), (2, 1), None)
    """
    starts = [i * size // out for i in range(out)]
    lengths = {-(-(i + 1) * size // out) - start for i, start in enumerate(starts)}
    strides = {b - a for a, b in zip(starts, starts[1:], strict=False)} or {size}
    if len(lengths) > 1 or len(strides) > 1 or 0 in strides:
        return None
    return lengths.pop(), strides.pop()


def pooling(op: str, x: Tensor, size: Any) -> tuple[list[int], list[int]] | None:
    """Kernels and strides of an adaptive pooling of `x` (..., *spatial) to `size`, if there are."""
    dims = int(op.removesuffix("d")[-1])
    spatial = x.shape[-dims:]
    sizes = list(size) if isinstance(size, list | tuple) else [size] * dims
    found = [windows(s, s if o is None else o) for s, o in zip(spatial, sizes, strict=True)]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < dims:
        return None
    return [kernel for kernel, _ in pairs], [stride for _, stride in pairs]


def _fixed(_notes: Notes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The pooling that gives the same at the shape that is met; the call itself where none does."""
    op = func.__name__.strip("_")
    x, size = arguments(args, kwargs)
    found = pooling(op, x, size)
    if found is None or returns_indices(args, kwargs):
        return func(*args, **kwargs)
    dims = len(found[0])
    if "max" in op:
        plain: Callable[..., Tensor] = getattr(functional, f"max_pool{dims}d")
    else:
        plain = getattr(functional, f"avg_pool{dims}d")
    return plain(x, *found)


def _padded(_notes: Notes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The convolution of an input that is filled up with zeros to the channels of the weight."""
    named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
    x, weight = named.pop("input"), named.pop("weight")  # (N, C, *spatial), (out, C', *kernel)
    more = weight.shape[1] - x.shape[1]
    wide = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, more))
    return func(wide, weight, *args[2:], **named)


def arguments(args: Any, kwargs: Any) -> tuple[Tensor, Any]:
    """Input and output size of a call of adaptive pooling."""
    size = args[1] if len(args) > 1 else kwargs["output_size"]
    return _input(args, kwargs), size


def returns_indices(args: Any, kwargs: Any) -> bool:
    """Whether a call of adaptive max pooling tells where the maxima are."""
    return bool(kwargs.get("return_indices", args[2] if len(args) > 2 else False))


REPLACEMENTS: Mapping[str, Replacement] = {
    "hard-swish": _hardswish,
    "hard-sigmoid": _hardsigmoid,
    "tanh form of GELU": _gelu_tanh,
    "its input": _same,
    "pooling with fixed windows": _fixed,
    "the same over an input filled up with zeros": _padded,
    "noted": _noted,
    "hard-swish, where it multiplies by the sigmoid of the same": _gated,
}
