"""Replaces operation calls that a module's own forward makes, wherever the module is called from.

A functional call has no module that could be swapped. `OwnCalls` takes the place of the module's
``forward``, runs it under a mode, and leaves alone what the modules inside it compute. Modes that
are active outside (masks, fake-quantizers, torch.export) meet the replaced calls.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from slimkit.calls import operation_name
from slimkit.rewriting.replacements import REPLACEMENTS, Notes


class OwnCalls:
    """The forward of one module with some of its own calls replaced.

    Args:
        module: whose forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = vars(module).get("forward")  # someone else's, in place of the class's
        self.becomes: dict[str, str] = {}
        self.passes: dict[str, str] = {}

    @classmethod
    def of(cls, module: nn.Module) -> OwnCalls:
        """What replaces calls of `module` already, or a new one."""
        found = vars(module).get("forward")
        if not isinstance(found, cls):
            found = cls(module)
            module.forward = found
        return found

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward itself, by which others know the arguments."""
        return inspect.signature(self._forward)

    @property
    def __code__(self) -> Any:
        """That of the forward itself, by which torch.export says where an operation comes from."""
        return getattr(self._forward, "__code__")  # noqa: B009  (a Callable need not have it)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        with _Frame(self):
            return self._forward(*args, **kwargs)

    @property
    def _forward(self) -> Callable[..., Any]:
        if self.before is not None:
            return self.before
        forward: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return forward


class _Frame(TorchFunctionMode):
    """Meets the calls of one forward; those of modules that it calls pass."""

    def __init__(self, own: OwnCalls) -> None:
        super().__init__()
        self.own = own
        self.depth = 0
        self.notes: Notes = {}
        self.held: dict[str, Tensor] = {}
        self.seen: Counter[str] = Counter()
        self._handles: list[Any] = []

    def __enter__(self) -> _Frame:
        self._handles = [
            register_module_forward_pre_hook(self._deeper),
            register_module_forward_hook(self._back, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()

    def _deeper(self, _module: nn.Module, _args: Any) -> None:
        self.depth += 1

    def _back(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.depth -= 1

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        op = operation_name(func)
        name = f"{op}:{self.seen[op]}"
        self.seen[op] += 1
        for end, source in self.own.passes.items():
            if name == source:
                self.held[end] = args[0] if args else kwargs["input"]
            if name == end:
                return self.held.pop(end)
        replacement = self.own.becomes.get(op)
        if replacement is None:
            return func(*args, **kwargs)
        return REPLACEMENTS[replacement](self.notes, func, args, kwargs)
