"""A .tflite file as a graph that can be changed: its main subgraph, in order of execution."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_ALIGNMENT = 16  # bytes, of constants: kernels read them in place
_IDENTIFIER = b"TFL3"
_KINDS = {code: name for name, code in vars(schema.BuiltinOperator).items() if type(code) is int}
_TYPES: dict[int, Any] = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.INT8: np.int8,
    schema.TensorType.INT32: np.int32,
    schema.TensorType.INT64: np.int64,
    schema.TensorType.BOOL: np.bool_,
    schema.TensorType.UINT8: np.uint8,
    schema.TensorType.INT16: np.int16,
}
_CODES = {np.dtype(kind): code for code, kind in _TYPES.items()}


@dataclass(frozen=True)
class Step:
    """How the integers of a tensor stand for numbers: (q - zero) * size.

    Args:
        size: of one step, float32.
        zero: the integer that stands for 0.
    """

    size: float
    zero: int


class Graph:
    """The main subgraph of a model; tensors are numbers, operators objects of the schema.

    Args:
        data: a .tflite file.
    """

    def __init__(self, data: bytes) -> None:
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
        self.graph = self.model.subgraphs[0]
        self.operators: list[Any] = list(self.graph.operators)
        for one in (self.graph, *self.operators):
            one.inputs, one.outputs = [*map(int, one.inputs)], [*map(int, one.outputs)]

    def kind(self, operator: Any) -> str:
        """The operator's type, such as ``CONV_2D``."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        return str(_KINDS[number] if number != schema.BuiltinOperator.CUSTOM else code.customCode)

    def shape(self, tensor: int) -> tuple[int, ...]:
        """The tensor's shape."""
        shape = self.graph.tensors[tensor].shape
        return () if shape is None else tuple(int(n) for n in shape)

    def is_integer(self, tensor: int) -> bool:
        """Whether it holds the integers of rounded numbers."""
        found = self.graph.tensors[tensor]
        return bool(found.type == schema.TensorType.INT8 and self.scales(tensor) is not None)

    def is_float(self, tensor: int) -> bool:
        """Whether it holds float32."""
        return bool(self.graph.tensors[tensor].type == schema.TensorType.FLOAT32)

    def scales(self, tensor: int) -> tuple[np.ndarray, int] | None:
        """The sizes of the steps and the dimension that they run along, if it has any."""
        given = self.graph.tensors[tensor].quantization
        if given is None or given.scale is None or not len(given.scale):
            return None
        return np.asarray(given.scale, np.float32), int(given.quantizedDimension)

    def step(self, tensor: int) -> Step | None:
        """The step of a tensor that has one for all of its values."""
        found = self.scales(tensor)
        if found is None or len(found[0]) != 1:
            return None
        zeros = self.graph.tensors[tensor].quantization.zeroPoint
        return Step(float(found[0][0]), 0 if zeros is None or not len(zeros) else int(zeros[0]))

    def constant(self, tensor: int) -> np.ndarray | None:
        """The values of a tensor that has them in the file."""
        if tensor < 0:
            return None
        found = self.graph.tensors[tensor]
        data = self.model.buffers[found.buffer].data
        if data is None or not len(data) or found.type not in _TYPES:
            return None
        return np.frombuffer(bytes(data), _TYPES[found.type]).reshape(self.shape(tensor))

    def add(
        self,
        shape: Sequence[int],
        kind: Any,
        sizes: Sequence[float] | np.ndarray | None = None,
        zeros: Sequence[int] = (0,),
        axis: int = 0,
        values: np.ndarray | None = None,
    ) -> int:
        """A new tensor of this graph.

        Args:
            shape: its shape.
            kind: a type of numpy.
            sizes: of the steps of its integers.
            zeros: their zero points; one is taken for all.
            axis: the dimension of several steps.
            values: for a constant.
        """
        tensor = schema.TensorT()
        tensor.shape = np.asarray(shape, np.int32)
        tensor.type = _CODES[np.dtype(kind)]
        tensor.name, tensor.hasRank = "", True
        if sizes is not None:
            steps = schema.QuantizationParametersT()
            steps.scale = np.asarray(sizes, np.float32)
            steps.zeroPoint = np.resize(np.asarray(zeros, np.int64), len(steps.scale))
            steps.quantizedDimension = axis
            tensor.quantization = steps
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def like(self, tensor: int, step: Step | None) -> int:
        """A new tensor of the same shape: int8 on `step`, or float32 without one."""
        if step is None:
            return self.add(self.shape(tensor), np.float32)
        return self.add(self.shape(tensor), np.int8, [step.size], [step.zero])

    def new(self, kind: str, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        """A new operator, not yet in the graph."""
        number = getattr(schema.BuiltinOperator, kind)
        operator = schema.OperatorT()
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                operator.opcodeIndex = index
                return operator
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
        code.version = 1
        operator.opcodeIndex = len(self.model.operatorCodes)
        self.model.operatorCodes.append(code)
        return operator

    def readers(self) -> dict[int, list[Any]]:
        """Tensor -> the operators that read it."""
        found: dict[int, list[Any]] = defaultdict(list)
        for operator in self.operators:
            for tensor in operator.inputs:
                found[tensor].append(operator)
        return found

    def makers(self) -> dict[int, Any]:
        """Tensor -> the operator that makes it."""
        return {t: operator for operator in self.operators for t in operator.outputs}

    def replace(self, old: int, new: int) -> None:
        """Let all that reads `old`, outside as well, read `new`."""
        for operator in self.operators:
            operator.inputs = [new if t == old else t for t in operator.inputs]
        self.replace_output(old, new)

    def replace_output(self, old: int, new: int) -> None:
        """Let the model's output `old` be `new`."""
        self.graph.outputs = [new if t == old else t for t in self.graph.outputs]
        for signature in self.model.signatureDefs or []:
            for entry in signature.outputs:
                if entry.tensorIndex == old:
                    entry.tensorIndex = new

    def replace_input(self, old: int, new: int) -> None:
        """Let the model's input `old` be `new`."""
        self.graph.inputs = [new if t == old else t for t in self.graph.inputs]
        for signature in self.model.signatureDefs or []:
            for entry in signature.inputs:
                if entry.tensorIndex == old:
                    entry.tensorIndex = new

    def is_whole(self, tensor: int) -> bool:
        """Whether a constant has as many bytes as its shape asks for."""
        data = self.model.buffers[self.graph.tensors[tensor].buffer].data
        kind = _TYPES.get(self.graph.tensors[tensor].type)
        if data is None or not len(data) or kind is None:
            return True
        wanted = int(np.prod(self.shape(tensor), dtype=np.int64)) * np.dtype(kind).itemsize
        return len(data) == wanted

    def alone(self, number: int) -> bytes:
        """A file of one operator, which reads what is no constant and gives all that it makes.

        The graph is used up by it.
        """
        operator = self.operators[number]
        self.operators, self.model.signatureDefs = [operator], None
        read = dict.fromkeys(t for t in operator.inputs if t >= 0 and not self._is_filled(t))
        self.graph.inputs, self.graph.outputs = [*read], list(operator.outputs)
        return self.packed()

    def _is_filled(self, tensor: int) -> bool:
        data = self.model.buffers[self.graph.tensors[tensor].buffer].data
        return data is not None and len(data) > 0

    def drop_unread(self) -> None:
        """Leave out the operators whose outputs nobody reads."""
        needed = set(self.graph.outputs)
        kept = []
        for operator in reversed(self.operators):
            if needed.intersection(operator.outputs):
                kept.append(operator)
                needed.update(operator.inputs)
        self.operators = kept[::-1]

    def packed(self) -> bytes:
        """The file: without tensors, constants and names that nothing needs."""
        self.graph.operators = self.operators
        self._keep_tensors(sorted(set(self._used())))
        for subgraph in self.model.subgraphs:
            _shorten_names(subgraph)
        self._keep_buffers()
        self._keep_codes()
        self.model.description = "slimkit"
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self.model.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())

    def _used(self) -> Iterator[int]:
        yield from (*self.graph.inputs, *self.graph.outputs)
        for operator in self.operators:
            tensors = (operator.inputs, operator.outputs, operator.intermediates)
            yield from (int(t) for group in tensors if group is not None for t in group if t >= 0)

    def _keep_tensors(self, kept: list[int]) -> None:
        new = {old: n for n, old in enumerate(kept)} | {-1: -1}

        def renumbered(tensors: Any) -> Any:
            return None if tensors is None else [new[int(t)] for t in tensors]

        self.graph.tensors = [self.graph.tensors[old] for old in kept]
        self.graph.inputs = renumbered(self.graph.inputs)
        self.graph.outputs = renumbered(self.graph.outputs)
        for operator in self.operators:
            operator.inputs = renumbered(operator.inputs)
            operator.outputs = renumbered(operator.outputs)
            operator.intermediates = renumbered(operator.intermediates)
        for signature in self.model.signatureDefs or []:
            for entry in (*(signature.inputs or []), *(signature.outputs or [])):
                entry.tensorIndex = new[entry.tensorIndex]

    def _keep_buffers(self) -> None:
        """The first one is empty and stands for no values."""
        buffers, new = [schema.BufferT()], {0: 0}
        for subgraph in self.model.subgraphs:
            for tensor in subgraph.tensors:
                if tensor.buffer not in new:
                    data = self.model.buffers[tensor.buffer].data
                    filled = data is not None and len(data)
                    new[tensor.buffer] = len(buffers) if filled else 0
                    if filled:
                        buffers.append(_Aligned(data))
                tensor.buffer = new[tensor.buffer]
        self.model.buffers = buffers
        self.model.metadata = self.model.metadataBuffer = None

    def _keep_codes(self) -> None:
        codes, new = list[Any](), dict[int, int]()
        for subgraph in self.model.subgraphs:
            for operator in subgraph.operators or []:
                if operator.opcodeIndex not in new:
                    new[operator.opcodeIndex] = len(codes)
                    codes.append(self.model.operatorCodes[operator.opcodeIndex])
                operator.opcodeIndex = new[operator.opcodeIndex]
        self.model.operatorCodes = codes


class _Aligned(schema.BufferT):
    """A constant whose bytes begin at a multiple of 16."""

    def Pack(self, builder: Any) -> Any:  # noqa: N802  (the schema's own name)
        """Its offset."""
        content = bytes(self.data)
        builder.StartVector(1, len(content), _ALIGNMENT)
        builder.head -= len(content)
        builder.Bytes[builder.head : builder.head + len(content)] = content
        values = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, values)
        return schema.BufferEnd(builder)


def _shorten_names(subgraph: Any) -> None:
    """Number the tensors; the converter's names hold the paths of the model's source files."""
    outer = {int(t) for t in (*subgraph.inputs, *subgraph.outputs)}
    for number, tensor in enumerate(subgraph.tensors):
        if number not in outer:
            tensor.name = f"t{number}"
