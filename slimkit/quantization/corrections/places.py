"""The layers that corrections work on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from slimkit.calls import WEIGHTED, Call, Trace
from slimkit.quantization.sites import Sites


@dataclass(frozen=True)
class Place:
    """One call of a layer with a weight, and the batch-norm that alone reads its output.

    Args:
        call: the convolution's or the linear layer's.
        norm: the batch-norm's, in evaluation mode, if there is one.
        once: whether weight, bias and the batch-norm's state serve this call and no other.
    """

    call: Call
    norm: Call | None
    once: bool

    @property
    def weight(self) -> str:
        """The weight's dotted path."""
        return self.call.weight_path or ""

    @property
    def bias(self) -> str | None:
        """The bias's dotted path."""
        return self.call.bias_path

    @property
    def layer(self) -> str:
        """The layer's dotted path."""
        return self.weight.removesuffix(".weight")

    @property
    def end(self) -> str:
        """The call that makes the layer's output."""
        return self.call.name if self.norm is None else self.norm.name

    @property
    def axis(self) -> int:
        """The dimension of the output channels, from the end."""
        return -1 if self.call.op == "linear" else -1 - int(self.call.op[-2])

    def of_norm(self, position: int, name: str) -> str | None:
        """The path of one of the batch-norm's tensors."""
        assert self.norm is not None
        return self.norm.state.get(position, self.norm.state.get(name))


def places(traced: Trace) -> list[Place]:
    """Every call of a layer whose weight is a parameter, in order."""
    readers = traced.readers()
    used = Counter(path for call in traced.calls for path in set(call.state.values()))
    found = []
    for call in traced.calls:
        if call.op not in WEIGHTED or call.weight_path is None:
            continue
        behind = readers.get(call.outputs[0], [])
        norm = None
        if len(behind) == 1 and behind[0].op == "batch_norm":
            known = 1 in behind[0].state or "running_mean" in behind[0].state
            if known and call.outputs[0] not in traced.outputs:
                norm = behind[0]
        state = [*call.state.values(), *(norm.state.values() if norm is not None else ())]
        found.append(Place(call, norm, all(used[path] == 1 for path in state)))
    return found


def rounded_places(traced: Trace, sites: Sites) -> list[Place]:
    """Those whose weight is rounded."""
    return [place for place in places(traced) if place.call.name in sites.weights]


def named(op: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a layer's call by name."""
    names = ["input", "weight", "bias"]
    if op != "linear":
        names += ["stride", "padding", "dilation", "groups"]
    return dict(zip(names, args, strict=False)) | kwargs
