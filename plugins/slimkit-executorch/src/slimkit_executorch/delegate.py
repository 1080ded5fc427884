"""The graph that a file hands to XNNPACK, and which of its nodes XNNPACK makes one of."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from slimkit_executorch.runtime import part

_INFINITE = re.compile(r"\binf\b")  # a bound that there is not, which JSON has another word for
_UNARY = frozenset(
    {"Abs", "Ceiling", "Clamp", "Convert", "Cos", "ELU", "Exp", "Floor", "Gelu", "Hardswish"}
    | {"LeakyReLU", "Log", "Negate", "ReciprocalSquareRoot", "Sigmoid", "Sin", "Square"}
    | {"SquareRoot", "Tanh"}
)
_BINARY = frozenset({"Add", "Div", "Maximum", "Minimum", "Multiply", "Subtract"})
_POINTWISE = (
    *((f"kernel_{side}", 1) for side in ("height", "width")),
    *((f"subsampling_{side}", 1) for side in ("height", "width")),
    *((f"padding_{side}", 0) for side in ("top", "right", "bottom", "left")),
    ("groups", 1),
)
_OUTPUT = 2  # flag of a tensor that leaves the graph
_LONGEST = 10  # nodes that XNNPACK puts into one table at most


@dataclass(frozen=True)
class XnnNode:
    """One operator.

    Args:
        kind: its name in ExecuTorch's schema, without the prefix.
        reads: numbers of its tensors, constants too.
        gives: number of its output.
        is_linear: whether XNNPACK computes it as a linear layer: one, or a convolution that reads
            one pixel for each that it gives.
    """

    kind: str
    reads: tuple[int, ...]
    gives: int
    is_linear: bool = False


@dataclass(frozen=True)
class XnnGraph:
    """All operators in order, and facts of the tensors between them.

    Args:
        nodes: the operators.
        types: number of a tensor to its type, such as ``fp32``, ``qint8`` or ``qdint8``.
        numbers: the tensors that are constants of one value.
        outputs: the tensors that leave the graph.
    """

    nodes: tuple[XnnNode, ...]
    types: dict[int, str]
    numbers: frozenset[int]
    outputs: frozenset[int]

    def is_integer(self, tensor: int) -> bool:
        """Whether its values are bytes."""
        return self.types.get(tensor, "").endswith("int8")

    def steps(self) -> Iterator[tuple[XnnNode, ...]]:
        """The nodes as XNNPACK executes them: one by one, or as many as it puts into one table.

        A function of one rounded tensor that is rounded again is a table of 256 bytes.
        XNNPACK finds such chains when a file is opened
        (`xnn_subgraph_fuse_unary_quantized_into_lut` in its ``src/subgraph.c``).
        """
        readers = Counter(tensor for node in self.nodes for tensor in node.reads)
        by_input = {tensor: node for node in self.nodes for tensor in node.reads}
        gone = set[int]()
        for node in self.nodes:
            if node.gives in gone:
                continue
            chain, end = [node], node
            if self._is_function(node) and self.is_integer(node.reads[0]):
                while len(chain) < _LONGEST:
                    alone = readers[end.gives] == 1 and end.gives not in self.outputs
                    if not alone or not self._is_function(by_input[end.gives]):
                        break
                    end = by_input[end.gives]
                    chain.append(end)
                while len(chain) > 1 and not self.is_integer(chain[-1].gives):
                    chain.pop()
            gone.update(one.gives for one in chain)
            yield tuple(chain)

    def _is_function(self, node: XnnNode) -> bool:
        """Whether each of its values follows from one value of one tensor."""
        if node.kind in _UNARY:
            return True
        return node.kind in _BINARY and sum(t not in self.numbers for t in node.reads) == 1


def graph_of(blob: bytes) -> XnnGraph:
    """The graph in a delegate's data, by the compiler of schemas that ExecuTorch brings along."""
    header = part("backends.xnnpack.serialization.xnnpack_graph_serialize").XNNHeader
    found = header.from_bytes(blob[: header.EXPECTED_LENGTH])
    begin = found.flatbuffer_offset
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schema = files("executorch.backends.xnnpack.serialization").joinpath("schema.fbs")
        (folder / "schema.fbs").write_bytes(schema.read_bytes())
        (folder / "graph.bin").write_bytes(blob[begin : begin + found.flatbuffer_size])
        part("exir._serialize._flatbuffer")._flatc_decompile(
            name, str(folder / "schema.fbs"), str(folder / "graph.bin")
        )
        text = (folder / "graph.json").read_text()
    return _graph(json.loads(_INFINITE.sub("Infinity", text)))


def _graph(data: dict[str, Any]) -> XnnGraph:
    nodes, types, numbers, outputs = [], {}, set(), set()
    for value in data["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        number = tensor["id_out"]
        types[number] = tensor["datatype"].removeprefix("xnn_datatype_")
        if tensor["constant_buffer_idx"] and all(size == 1 for size in tensor["dims"]):
            numbers.add(number)
        if tensor["flags"] & _OUTPUT:
            outputs.add(number)
    for node in data["xnodes"]:
        ends = node["xnode_union"]
        reads = tuple(n for key, n in ends.items() if key.startswith("input") and n in types)
        kind = node["xnode_union_type"].removeprefix("XNN")
        is_linear = kind == "FullyConnected" or (
            kind == "Conv2d" and all(ends[key] == wanted for key, wanted in _POINTWISE)
        )
        nodes.append(XnnNode(kind, reads, ends["output_id"], is_linear))
    return XnnGraph(tuple(nodes), types, frozenset(numbers), frozenset(outputs))
