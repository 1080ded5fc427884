"""Names every operation call of a running model: module path, operation, and how often before.

The names are stable between training and evaluation and need no change to the model, so masks,
fake-quantizers and costs can be kept by name. Functional calls are seen as well as modules.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from slimkit.evaluating import evaluating, replaced

_SAME = {
    "concat": "cat",
    "concatenate": "cat",
    "iadd": "add",
    "imul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "multiply": "mul",
    "radd": "add",
    "rmatmul": "matmul",
    "rmul": "mul",
    "rsub": "sub",
    "truediv": "div",
}
WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d")
"""Operations that take (input, weight, bias) as their first arguments."""


def operation_name(func: Callable[..., Any]) -> str:
    """The one name of an operation, however it was written.

    >>> operation_name(torch.Tensor.__iadd__), operation_name(torch.add)
    ('add', 'add')
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property of tensors, such as mT
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    name = name.strip("_")
    return _SAME.get(name, name)


class CallMode(TorchFunctionMode):
    """Meets each operation of `model` under its name; a subclass says what to do in `on_call`.

    A name reads ``layer1/0/conv1:conv2d:0``: the module whose forward makes the call, the
    operation, and the number of such calls before it in this forward of the whole model.
    Operations outside the model's forward (losses, metrics) pass untouched.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._paths = {id(m): name.replace(".", "/") for name, m in model.named_modules()}
        self._stack: list[str] = []
        self._seen: Counter[str] = Counter()
        self._handles: list[Any] = []
        self._model = model
        self._by_name = ExitStack()

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute the operation's result; `args` and `kwargs` are the call's own."""
        raise NotImplementedError

    def __enter__(self) -> CallMode:
        self._handles = [
            register_module_forward_pre_hook(self._push),
            register_module_forward_hook(self._pop, always_call=True),
        ]
        self._by_name.enter_context(replaced(self._model, self._whole(self._model.forward)))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._by_name.close()
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    def _whole(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, met as well where it is called by name and no hook runs."""

        @functools.wraps(forward)
        def met(*args: Any, **kwargs: Any) -> Any:
            if self._stack:
                return forward(*args, **kwargs)
            self._push(self._model, args)
            try:
                return forward(*args, **kwargs)
            finally:
                self._pop(self._model, args, None)

        return met

    def _push(self, module: nn.Module, _args: Any) -> None:
        path = self._paths.get(id(module))
        if path is None:
            return
        if not self._stack:
            self._seen.clear()
        self._stack.append(path)

    def _pop(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) in self._paths and self._stack:
            self._stack.pop()

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        op = operation_name(func)
        if not self._stack or not op:
            return func(*args, **kwargs)
        prefix = f"{self._stack[-1]}:{op}"
        name = f"{prefix}:{self._seen[prefix]}"
        self._seen[prefix] += 1
        return self.on_call(name, op, func, args, kwargs)


@dataclass(frozen=True)
class Call:
    """One operation call of a traced forward.

    Args:
        name: as `CallMode` names it.
        op: the operation.
        inputs: numbers of the tensors it read, in order of its arguments; parameters and buffers
            are not among them.
        outputs: numbers of the tensors it made.
        state: parameters and buffers it read: argument position to dotted path.
        arguments: its other arguments, by position or name.
        shape: of its first output.
    """

    name: str
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    state: Mapping[int | str, str]
    arguments: Mapping[int | str, Any]
    shape: tuple[int, ...]

    @property
    def weight_path(self) -> str | None:
        """Of a call of `WEIGHTED`: the weight's dotted path; None where it is computed."""
        return self.state.get(1, self.state.get("weight"))

    @property
    def bias_path(self) -> str | None:
        """Of a call of `WEIGHTED`: the bias's dotted path; None where it has none of its own."""
        return self.state.get(2, self.state.get("bias"))


@dataclass
class Trace:
    """The operation calls of one forward, and which tensors came in and went out."""

    calls: list[Call] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: frozenset[int] = frozenset()

    def readers(self) -> dict[int, list[Call]]:
        """The calls that read each tensor."""
        readers: dict[int, list[Call]] = {}
        for call in self.calls:
            for number in dict.fromkeys(call.inputs):
                readers.setdefault(number, []).append(call)
        return readers


class _Recorder(CallMode):
    """Numbers every tensor and writes the calls down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.trace = Trace()
        self.numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives
        state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        self._state = {id(t): name for name, t in reversed(state)}

    def number(self, tensor: Tensor, *, new: bool = False) -> int:
        if new or id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return self.numbers[id(tensor)]

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs: list[int] = []
        state: dict[int | str, str] = {}
        arguments: dict[int | str, Any] = {}
        for position, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, Tensor) and id(value) in self._state:
                state[position] = self._state[id(value)]
                continue
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            inputs += [self.number(t) for t in tensors if id(t) not in self._state]
            if not tensors:
                arguments[position] = value
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if made and not all(id(t) in self._state for t in made):
            outputs = tuple(self.number(t, new=True) for t in made)
            shape = tuple(made[0].shape)
            self.trace.calls.append(Call(name, op, tuple(inputs), outputs, state, arguments, shape))
        return out


def trace(model: nn.Module, inputs: tuple[Any, ...]) -> Trace:
    """Run `model` once on `inputs` in evaluation mode and write its operation calls down.

    The model's training flags are restored and nothing else of it changes.
    """
    recorder = _Recorder(model)
    with evaluating(model), torch.no_grad(), recorder:
        numbers = [recorder.number(t) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        out = model(*inputs)
        recorder.trace.inputs = tuple(numbers)
        leaves = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        recorder.trace.outputs = frozenset(recorder.number(t) for t in leaves)
    return recorder.trace


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor in nested tuples, lists and dicts."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)
