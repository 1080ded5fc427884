"""Activation functions become cheaper ones that are nearly the same; the cost is measured.

Hard-swish and hard-sigmoid: Howard et al., "Searching for MobileNetV3", 2019. The form of GELU with
tanh: Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", 2016.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from slimkit.calls import Call, Trace
from slimkit.rewriting.changes import Calls, Change, Swap
from slimkit.rewriting.found import Found, check_places, owner, traced, within

_PRODUCT = {"sigmoid": "noted", "mul": "hard-swish, where it multiplies by the sigmoid of the same"}


def silu_to_hardswish(
    model: nn.Module, inputs: tuple[Any, ...], *, at: Sequence[str] = ()
) -> Found:
    """SiLU, x * sigmoid(x) written out as well, becomes x * relu6(x + 3) / 6.

    Args:
        model: not changed.
        inputs: the forward's arguments.
        at: modules in which to do it, by name, * and ? allowed; none: all.
    """
    check_places(model, at)
    calls = traced(model, inputs)
    silu = [c for c in calls.calls if c.op == "silu" and within(owner(c), at)]
    products = [c for c in _products(calls) if within(owner(c), at)]
    changes = _swapped(model, silu, nn.SiLU, "Hardswish", {"silu": "hard-swish"})
    return Found([*changes, *_in_forwards(products, _PRODUCT)])


def sigmoid_to_hardsigmoid(
    model: nn.Module, inputs: tuple[Any, ...], *, at: Sequence[str] = ()
) -> Found:
    """Sigmoid becomes relu6(x + 3) / 6.

    Args:
        model: not changed.
        inputs: the forward's arguments.
        at: modules in which to do it, by name, * and ? allowed; none: all.
    """
    check_places(model, at)
    found = [c for c in traced(model, inputs).calls if c.op == "sigmoid" and within(owner(c), at)]
    return Found(_swapped(model, found, nn.Sigmoid, "Hardsigmoid", {"sigmoid": "hard-sigmoid"}))


def gelu_to_tanh(model: nn.Module, inputs: tuple[Any, ...], *, at: Sequence[str] = ()) -> Found:
    """GELU becomes x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).

    Args:
        model: not changed.
        inputs: the forward's arguments.
        at: modules in which to do it, by name, * and ? allowed; none: all.
    """
    check_places(model, at)
    found = [
        call
        for call in traced(model, inputs).calls
        if call.op == "gelu"
        and call.arguments.get("approximate", "none") != "tanh"
        and within(owner(call), at)
    ]
    becomes = {"gelu": "tanh form of GELU"}
    return Found(_swapped(model, found, nn.GELU, "GELU", becomes, {"approximate": "tanh"}))


def _products(calls: Trace) -> list[Call]:
    """The multiplications of a tensor by its own sigmoid, both in the same forward."""
    sigmoids = {c.outputs[0]: c for c in calls.calls if c.op == "sigmoid"}
    found = []
    for call in calls.calls:
        if call.op != "mul" or len(call.inputs) != 2:
            continue
        for gate, x in (call.inputs, call.inputs[::-1]):
            made = sigmoids.get(gate)
            if made is not None and made.inputs == (x,) and owner(made) == owner(call):
                found.append(call)
    return found


def _swapped(
    model: nn.Module,
    calls: Iterable[Call],
    kind: type[nn.Module],
    becomes: str,
    replaced: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
) -> list[Change]:
    """Modules of exactly `kind` become another; forwards that call the function are replaced."""
    modules: list[Call] = []
    written: list[Call] = []
    for call in calls:
        module = model.get_submodule(owner(call))
        plain = type(module) is kind and "forward" not in vars(module)
        (modules if plain else written).append(call)
    given = dict(options or {})
    swaps: list[Change] = []
    for path in dict.fromkeys(map(owner, modules)):
        in_place = getattr(model.get_submodule(path), "inplace", False)
        swaps.append(Swap(path, becomes, given | ({"inplace": True} if in_place else {})))
    return [*swaps, *_in_forwards(written, replaced)]


def _in_forwards(calls: Iterable[Call], becomes: Mapping[str, str]) -> list[Change]:
    counts = Counter(map(owner, calls))
    return [Calls(path, dict(becomes), count) for path, count in counts.items()]
