"""Writes a forward down while it runs, as `torch.export` would, in the time of the forward.

PyTorch calls a mode for the pre-dispatch key with every ATen operation before it is taken apart
(`conv2d`, `linear`, `layer_norm` ...), whoever calls it. `torch.export` hangs on the same hook, but
takes a second to set up and five times as long for each operation. The hook is no public interface:
this file is the only one that touches it, and `exporting` takes over where it fails.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from slimkit.batches import fresh
from slimkit.errors import PruningError
from slimkit.evaluating import without_fast_paths
from slimkit.interfaces import tensors_of
from slimkit.pruning.removal import tensors_by_name
from slimkit.pruning.written import Written

LOOKS = frozenset({"item", "_local_scalar_dense", "is_nonzero", "equal", "allclose"})
"""Operations that give Python a number, which the code may decide by."""


class LooksAtDataError(PruningError):
    """A forward that depends on the values of its data."""


class NoOutputError(PruningError):
    """A forward whose result cannot be looked at."""


def recorded(model: nn.Module, example_inputs: tuple[Any, ...]) -> Written:
    """Run `model` once and write down what it does; statistics in its buffers may move.

    Raises:
        LooksAtDataError: the forward takes a number out of a tensor that depends on its inputs.
        Exception: whatever the forward raises.
    """
    example_inputs = fresh(example_inputs)  # the forward may write into them
    recorder = _Recorder(model, example_inputs)
    with (
        torch.no_grad(),
        without_fast_paths(),
        recorder.following_modules(),
        enable_python_dispatcher(),
        recorder,
    ):
        out = model(*example_inputs)
    outputs = [recorder.node_of(tensor) for tensor in tensors_of(out)]
    if not outputs:
        raise NoOutputError(f"the forward returns no tensor, but {type(out).__name__}")
    recorder.graph.output(tuple(outputs))
    return Written(recorder.graph, recorder.state, frozenset(recorder.constants))


class _Recorder(ProxyTorchDispatchMode):
    """Meets every operation; only a subclass of this mode is called at the pre-dispatch key."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.enter_stack = []
        self.graph = fx.Graph()
        self.state: dict[fx.Node, list[str]] = {}
        self.constants: set[fx.Node] = set()
        self._nodes: Any = WeakIdKeyDictionary()  # tensors that live
        self._by_storage: dict[tuple[Any, ...], fx.Node] = {}
        self._from_data: set[fx.Node] = set()
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._stack = [""]
        self._inputs = inputs  # so that no other tensor takes their places
        for name, tensor in tensors_by_name(model).items():
            node = self._enter(tensor)
            self.state.setdefault(node, []).append(name)
            self._by_storage.setdefault(_place(tensor), node)
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self._from_data.add(self._enter(leaf))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute one operation and add it to the graph."""
        kwargs = kwargs or {}
        given, named = tree_map(self._known, args), tree_map(self._known, kwargs)
        sources = {leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, fx.Node)}
        name = func.overloadpacket.__name__
        if name in LOOKS and not self._from_data.isdisjoint(sources):
            where = self._stack[-1] or "the model"
            raise LooksAtDataError(
                f"the forward of {where} takes a number out of a tensor ({name}), so it depends on "
                "the values of its data"
            )
        with no_python_dispatcher():
            out = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            return out
        node = self.graph.create_node("call_function", func, given, named)
        node.meta |= {"val": tree_map(_shape_only, out), "module": self._stack[-1]}
        made = [node]
        if isinstance(out, Tensor):
            self._nodes[out] = node
        else:
            for position, part in enumerate(out):
                if isinstance(part, Tensor):
                    got = self.graph.create_node(
                        "call_function", operator.getitem, (node, position)
                    )
                    got.meta |= {"val": _shape_only(part), "module": self._stack[-1]}
                    self._nodes[part] = got
                    made.append(got)
        if not self._from_data.isdisjoint(sources):
            self._from_data.update(made)
        return out

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that gave a tensor; one for a constant where no operation did."""
        node = self._nodes.get(tensor)
        if node is None:  # a parameter's `.data` is another tensor in the same place
            node = self._by_storage.get(_place(tensor))
        if node is None:
            node = self._enter(tensor)
            self.constants.add(node)
        return node

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Know which module's forward runs."""
        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._push),
                register_module_forward_hook(self._pop, always_call=True),
            ):
                stack.callback(handle.remove)
            yield

    def _push(self, module: nn.Module, _args: Any) -> None:
        if id(module) in self._paths:
            self._stack.append(self._paths[id(module)])

    def _pop(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) in self._paths:
            self._stack.pop()

    def _known(self, value: Any) -> Any:
        return self.node_of(value) if isinstance(value, Tensor) else value

    def _enter(self, tensor: Tensor) -> fx.Node:
        if tensor in self._nodes:
            return self._nodes[tensor]
        node = self.graph.create_node("placeholder", f"given_{len(self.graph.nodes)}")
        node.meta["val"] = _shape_only(tensor)
        self._nodes[tensor] = node
        return node


def _shape_only(value: Any) -> Any:
    """A tensor of the same shape and type without numbers."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where the numbers of a tensor lie in memory."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
