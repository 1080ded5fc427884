"""Finds where a graph splits channels into the heads of attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

SPLITS = frozenset({"view", "reshape", "unflatten", "_unsafe_view"})
SCALES = frozenset({"mul", "div", "add", "sub", "masked_fill", "where", "to", "dropout", "clone"})
PRODUCTS = frozenset({"matmul", "bmm", "einsum"})


def views_of_heads(graph: fx.Graph) -> set[fx.Node]:
    """The views in front of each attention in which heads become a dimension of their own.

    Attention is ``scaled_dot_product_attention``, or a softmax over a matrix product with another
    product behind it.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = _name(node)
        if name == "scaled_dot_product_attention":
            found.update(view for part in node.args[:3] for view in _split(part))
        elif name in ("softmax", "_softmax"):
            products = _back(node.args[0], SCALES | {"view", "reshape"}, PRODUCTS)
            for product in [*products, *(_ahead(node) if products else [])]:
                found.update(
                    view for operand in product.all_input_nodes for view in _split(operand)
                )
    return found


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else ""
    return name.rstrip("_")


def _back(node: object, through: frozenset[str], until: frozenset[str]) -> list[fx.Node]:
    """The nearest operations of a kind in front of a node, looking through others."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        one = ahead.pop()
        if not isinstance(one, fx.Node) or one in seen or one.op != "call_function":
            continue
        seen.add(one)
        name = _name(one)
        if name in until:
            found.append(one)
        elif name in through or not name:  # without a name: an element of a tuple
            ahead += one.all_input_nodes
    return found


MOVES = SCALES | {
    *(
        "transpose",
        "permute",
        "unbind",
        "select",
        "chunk",
        "split",
        "split_with_sizes",
        "contiguous",
    ),
    *("layer_norm", "rms_norm", "normalize", "expand", "squeeze", "unsqueeze", "slice", "softmax"),
}


def _split(node: object) -> Iterator[fx.Node]:
    """The views in front of a part of attention that make more dimensions than they take."""
    for view in _back(node, MOVES, SPLITS):
        source = view.args[0]
        if not isinstance(source, fx.Node) or "val" not in source.meta:
            continue
        more = view.meta["val"].dim() > source.meta["val"].dim()
        if more:
            yield view
        else:  # heads folded into the batch, say
            yield from _split(source)


def _ahead(node: fx.Node) -> Iterator[fx.Node]:
    """The matrix products that read what a softmax gives."""
    for user in node.users:
        if _name(user) in PRODUCTS:
            yield user
        elif _name(user) in SCALES | {"view", "reshape", "contiguous"}:
            yield from _ahead(user)
