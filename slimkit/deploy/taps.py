"""Makes a model that gives tensors from its inside as well, by the calls that make them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimkit.calls import WEIGHTED, Call, CallMode, trace
from slimkit.copies import copied
from slimkit.errors import SlimkitError
from slimkit.interfaces import tensors_of
from slimkit.quantization.fake import FakeQuantization, QuantizedModel
from slimkit.quantization.sites import Sites

_MERGED = frozenset(
    {"batch_norm", "relu", "relu6", "hardtanh", "clamp", "clip", "leaky_relu", "silu", "hardswish"}
)
"""Operations that belong to the layer in front of them: runtimes compute both in one step."""


@dataclass(frozen=True)
class Place:
    """A tensor inside a model.

    Args:
        layer: what makes it, for people, such as ``layer1.0.conv1`` or ``layer1.0 add``.
        call: the last call of that layer, as `slimkit.calls.CallMode` names it.
        step: size of one step of the grid that it is rounded to; None where it stays float.
        leaves: whether it is an output of the model anyway.
    """

    layer: str
    call: str
    step: float | None
    leaves: bool


def places(model: nn.Module, inputs: tuple[Any, ...]) -> list[Place]:
    """What each layer with weights makes, and all else that has a rounding of its own.

    A layer ends behind the batch-norm and the activation that nobody else comes between.

    Args:
        model: a float model or a `QuantizedModel`; not changed.
        inputs: the forward's arguments.

    Returns:
        In order of execution.
    """
    fake = model.fake if isinstance(model, QuantizedModel) else None
    sites = fake.sites if fake is not None else Sites()
    network = model.model if isinstance(model, QuantizedModel) else model
    traced = trace(network, inputs)
    readers = traced.readers()
    makers = {number: call for call in traced.calls for number in call.outputs}
    found: dict[str, Place] = {}
    for call in traced.calls:
        own = sites.outputs.get(call.name) == f"{call.name}:out"
        if not (call.op in WEIGHTED or own or _rounds_inputs(call, sites)):
            continue
        end = call
        while end.name not in sites.outputs and end.outputs[0] not in traced.outputs:
            behind = readers.get(end.outputs[0], [])
            if len(behind) != 1 or behind[0].op not in _MERGED or len(behind[0].outputs) != 1:
                break
            end = behind[0]
        if end.name not in found:
            while call.op in _MERGED and call.inputs and len(readers[call.inputs[0]]) == 1:
                made_by = makers.get(call.inputs[0])
                if made_by is None or made_by.name in sites.outputs:
                    break
                call = made_by  # an addition in front of its activation
            step = _step(end, readers, sites, fake)
            found[end.name] = Place(
                _layer(call), end.name, step, leaves=end.outputs[0] in traced.outputs
            )
    return list(found.values())


def _rounds_inputs(call: Call, sites: Sites) -> bool:
    """Whether the inputs of `call` have roundings of their own, as with ``placement: inputs``."""
    quantizers = sites.inputs.get(call.name, {}).values()
    return any(name.startswith(f"{call.name}:in") for name in quantizers)


def _layer(call: Call) -> str:
    """The module's path; a call beside the first of its module's is told apart by its operation."""
    path, op, count = call.name.split(":")
    path = path.replace("/", ".")
    if op in WEIGHTED and count == "0" and path:
        return path
    return f"{path} {op}{'' if count == '0' else f' {count}'}".strip()


def _step(
    call: Call, readers: dict[int, list[Call]], sites: Sites, fake: FakeQuantization | None
) -> float | None:
    """The step of a tensor's own grid, or of the one that its first reader rounds it to."""
    name = sites.outputs.get(call.name)
    for reader in readers.get(call.outputs[0], []) if name is None else []:
        position = reader.inputs.index(call.outputs[0])
        name = sites.inputs.get(reader.name, {}).get(position)
        if name is not None:
            break
    if name is None or fake is None:
        return None
    scale, _ = fake[name].qparams()
    return float(scale.detach().reshape(-1)[0])


class Tapped:
    """A copy of a model whose forward gives ``(outputs, tensors made at the places)``.

    It can be finished and compiled like the model itself: names of calls and parameters are the
    same.

    Args:
        model: a float model or a `QuantizedModel`; not changed.
        wanted: the places, none of which leaves the model by itself.
        sample: the forward's arguments; the model is run on them once.
        named: places that may leave the model by themselves, to name the outputs by.

    Raises:
        SlimkitError: the model's forward cannot be looked into.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Collection[Place],
        sample: tuple[Any, ...],
        named: Collection[Place] = (),
    ) -> None:
        self.model = copied(model).cpu().eval()
        network = self.model.model if isinstance(self.model, QuantizedModel) else self.model
        if "forward" in vars(network):
            raise SlimkitError(
                f"the forward of {type(network).__name__} was replaced on the object, which "
                "slimkit cannot look into: write it into the class"
            )
        calls = [place.call for place in wanted]
        looked_at = {place.call: place for place in (*wanted, *named)}
        seen: dict[str, tuple[Tensor, int]] = {}
        plain = type(network)
        network.__class__ = _watching(plain, looked_at, lambda mode: seen.update(mode.made))
        with torch.no_grad():
            outputs = tensors_of(self.model(*sample))
        cloned = frozenset(n for n, (t, version) in seen.items() if t._version != version)
        made_by = {id(t): looked_at[name] for name, (t, _) in seen.items()}
        self.outputs = [made_by.get(id(t)) for t in outputs]
        """Which of the places each output of the model is, where it is one."""
        network.__class__ = _watching(plain, calls, None, cloned)


def _watching(
    plain: type[nn.Module],
    calls: Collection[str],
    look: Callable[[_Watching], None] | None,
    cloned: Collection[str] = (),
) -> type[nn.Module]:
    """A class whose forward also gives what `calls` made, or shows it to `look`."""

    class Watched(plain):  # type: ignore[misc, valid-type]  # a class made for one model
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            mode = _Watching(self, calls, cloned)
            with mode:
                out = plain.forward(self, *args, **kwargs)
            if look is None:
                return out, tuple(mode.made[name][0] for name in calls)
            look(mode)
            return out

    Watched.__name__ = Watched.__qualname__ = plain.__name__
    return Watched


class _Watching(CallMode):
    """Keeps what certain calls make, as every other mode that is active has left it."""

    def __init__(self, model: nn.Module, calls: Collection[str], cloned: Collection[str]) -> None:
        super().__init__(model)
        self.calls = frozenset(calls)
        self.cloned = cloned
        self.made: dict[str, tuple[Tensor, int]] = {}

    def __enter__(self) -> CallMode:
        entered = super().__enter__()
        self._stack.append("")  # inside the model's own forward, which no hook tells any more
        return entered

    def on_call(self, name: str, op: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        out = func(*args, **kwargs)
        if name in self.calls:
            tensor = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            # a later operation may write into it
            self.made[name] = (tensor.clone() if name in self.cloned else tensor, tensor._version)
        return out
