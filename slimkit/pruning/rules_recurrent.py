"""How channels pass through recurrent layers: LSTM, GRU and plain ones, whole or one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from slimkit.pruning.identities import Ids, fixed
from slimkit.pruning.propagation import NotFollowedError, Propagation, Rule, option

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Rows of the weights are this many blocks, each as long as the hidden state."""


def _gates(name: str) -> int:
    return GATES[name.removesuffix("_cell")]


def _step(walk: Propagation, node: fx.Node, weights: Sequence[Any], x: Ids, gates: int) -> Ids:
    """Tie one layer's weights (input, hidden, biases) to its input and its own hidden state."""
    w_ih, w_hh = (walk.dims(weight) for weight in weights[:2])
    if w_ih is None or w_hh is None:
        raise NotFollowedError("weights that are no tensors")
    hidden = w_hh[1]
    walk.ids.tie(x, w_ih[1], "a recurrent layer over a fixed input")
    for made in (w_ih[0], w_hh[0]):
        walk.ids.tie(np.tile(hidden, gates), made, "the gates of a recurrent layer")
    for bias in weights[2:]:
        dims = walk.dims(bias)
        if dims is not None:
            walk.ids.tie(np.tile(hidden, gates), dims[0], "the gates of a recurrent layer")
    walk.note(node, weights[0], makes=0, reads=1)
    walk.note(node, weights[1], makes=0, reads=None)
    return hidden


def _starts(walk: Propagation, states: Sequence[Any], hidden: Ids) -> None:
    """The hidden state meets the one that it starts from; zeros may have any size."""
    for state in states:
        dims = walk.dims(state)
        if dims is None:
            continue
        packet = getattr(getattr(state, "target", None), "overloadpacket", None)
        if packet is not None and packet.__name__ in ("zeros", "new_zeros"):
            walk.doubt(hidden, [len(hidden)])
        else:
            walk.ids.tie(dims[-1], hidden, "a state that is given")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def cell(walk: Propagation, node: fx.Node, name: str) -> Any:
    """One step: the new hidden state, and the cell state of an LSTM."""
    states = _as_list(option(node, "hx"))
    weights = [option(node, key) for key in ("w_ih", "w_hh", "b_ih", "b_hh")]
    x = walk.tensor(node, 0)
    hidden = _step(walk, node, weights, x[-1], _gates(name))
    _starts(walk, states, hidden)
    out = [*x[:-1], hidden]
    return (list(out), list(out)) if name == "lstm_cell" else out


def layers(walk: Propagation, node: fx.Node, name: str) -> Any:
    """A whole sequence: the outputs, and the last states of all layers and directions."""
    if option(node, "params") is None or option(node, "data") is not None:
        raise NotFollowedError("a packed sequence")
    x, parameters = walk.tensor(node, 0), list(option(node, "params"))
    directions = 2 if option(node, "bidirectional") else 1
    count = option(node, "num_layers") * directions
    each = 4 if option(node, "has_biases") else 2
    if len(parameters) != count * each:
        raise NotFollowedError("projections")
    incoming, hidden = x[-1], None
    for layer in range(0, count, directions):
        made = []
        for k in range(layer, layer + directions):
            one = _step(walk, node, parameters[k * each : (k + 1) * each], incoming, _gates(name))
            # all layers and directions have one size, so they lose the same channels
            hidden = one if hidden is None else walk.ids.tie(hidden, one, "one size for all layers")
            made.append(one)
        incoming = np.concatenate(made)
    assert hidden is not None
    _starts(walk, _as_list(option(node, "hx")), hidden)
    batch = [] if len(x) == 2 else [x[0] if option(node, "batch_first") else x[1]]
    state = [fixed(count), *batch, hidden]
    out = [*x[:-1], incoming]
    return (out, list(state), list(state)) if name == "lstm" else (out, list(state))


RULES: dict[str, Rule] = {
    **dict.fromkeys([f"{name}_cell" for name in GATES], cell),
    **dict.fromkeys(GATES, layers),
}
