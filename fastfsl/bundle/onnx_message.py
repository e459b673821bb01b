"""The parts of an ONNX model that are looked at before ONNX Runtime parses it: nodes, constants, inputs and outputs.

Bytes that are no weights cost more than their number says: of each name, attribute and remark ONNX Runtime makes an
object. So they are few, whatever the weights are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastfsl.bundle.protobuf import BYTES, VARINT, fields, signed, varints

FLOAT, UINT8, INT8, INT32, INT64, BOOL, HALF, DOUBLE, UINT32, UINT64 = 1, 2, 3, 6, 7, 9, 10, 11, 12, 13
UINT16, INT16, UINT4, INT4 = 4, 5, 21, 22
FLOATS = frozenset({FLOAT, HALF, DOUBLE})
# All that a graph may compute with; float16, with which onnxruntime's CPU provider may end the process (1.30 and 1.31,
# on processors with AVX512-FP16), only where it is allowed.
DATA_TYPES = frozenset({FLOAT, UINT8, INT8, UINT16, INT16, INT32, INT64, BOOL, DOUBLE, UINT32, UINT64, UINT4, INT4})

# Our largest graphs have some 3000 nodes: a blend of two large towers, or a flow of 12 blocks and 40 steps. For 12 000
# ONNX Runtime takes more than a second.
MAX_NODES = 12_000
# Of a flow three tables stand for seven nodes; an int8 layer has four constants.
MAX_CONSTANTS = 24_000
# Bytes of a model besides its constants' data: ours take 150 for each node.
MAX_OTHER_BYTES = 4 * 2**20
# Bytes of a constant besides its data: its name and its sizes.
MAX_HEAD_BYTES = 4096
# Characters of a name, and names that a node reads or gives.
MAX_NAME = 1024
MAX_NAMES = 4096
# Of one dimension, step, window or margin that stands in a graph as an attribute.
MAX_ATTRIBUTE = 2**20
MAX_RANK = 64

# Attributes that say which type an operator gives or computes with; 0 is for "as the input".
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "softmax_precision", "stash_type", "precision"}
# Fields of an attribute that are values: a float, a whole number, bytes, a tensor, and lists of them.
_VALUE_FIELDS = frozenset({2, 3, 4, 5, 7, 8, 9, 10})
# Numbers of a constant that are kept, because they may be a shape or a divisor.
_KEPT = 64
_FORMATS = {
    FLOAT: "f", UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", INT32: "i", INT64: "q", BOOL: "B", DOUBLE: "d",
    UINT32: "I", UINT64: "Q",
}  # fmt: skip
# The least and the greatest number of each type of whole numbers.
WHOLE_RANGES = {
    **{kind: (-(2**bits) // 2, 2**bits // 2 - 1) for kind, bits in ((INT4, 4), (INT8, 8), (INT16, 16), (INT32, 32))},
    **{kind: (0, 2**bits - 1) for kind, bits in ((BOOL, 1), (UINT4, 4), (UINT8, 8), (UINT16, 16), (UINT32, 32))},
    INT64: (-(2**63), 2**63 - 1),
    UINT64: (0, 2**64 - 1),
}


@dataclass
class Tensor:
    """A constant.

    Args:
        name: in the graph; empty in an attribute.
        data_type: as TensorProto.DataType counts them.
        dims: its sizes.
        values: its numbers if they are few; None of others.
        head_bytes: of the message besides the data.
    """

    name: str = ""
    data_type: int = 0
    dims: list[int] = field(default_factory=list)
    values: list[float] | None = None
    head_bytes: int = 0

    @property
    def num_elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.dims)


@dataclass
class Node:
    """An operator: what it reads and gives, and its attributes as far as they are numbers or a constant."""

    domain: str = ""
    op_type: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    numbers: dict[str, list[int]] = field(default_factory=dict)
    constant: Tensor | None = None


@dataclass
class Value:
    """An input or output of a graph: its type, and its dimensions, None where one is open."""

    name: str = ""
    data_type: int = 0
    dims: list[int | None] = field(default_factory=list)


class OtherBytes:
    """Counts the bytes of a model that are no constants' data."""

    def __init__(self) -> None:
        self._left = MAX_OTHER_BYTES

    def take(self, num_bytes: int) -> None:
        """Count bytes of a field; two more are its number and kind.

        Raises:
            ValueError: there are too many.
        """
        self._left -= 2 + num_bytes
        if self._left < 0:
            raise ValueError(f"it has more than {MAX_OTHER_BYTES} bytes that are no weights")


def read_node(message: memoryview, types: frozenset[int]) -> Node:
    """A NodeProto."""
    node = Node()
    attributes = []
    for number, value in parts(message, {1: BYTES, 2: BYTES, 4: BYTES, 5: BYTES, 7: BYTES}):
        if number == 1:
            node.inputs.append(text(value))
        elif number == 2:
            node.outputs.append(text(value))
        elif number == 4:
            node.op_type = text(value)
        elif number == 5:
            attributes.append(as_bytes(value))
        elif number == 7:
            node.domain = text(value)
        if max(len(node.inputs), len(node.outputs), len(attributes)) > MAX_NAMES:
            raise ValueError(f"a node has more than {MAX_NAMES} inputs, outputs or attributes")
    _note_attributes(node, attributes, types)
    return node


def _note_attributes(node: Node, attributes: list[memoryview], types: frozenset[int]) -> None:
    is_constant = node.op_type == "Constant"
    for attribute in attributes:
        name, numbers, tensor = _attribute(attribute, types, is_constant=is_constant)
        if name in _TYPE_ATTRIBUTES:
            for one in numbers:
                check_type(one, types | {0})
        if name == "num_outputs" and numbers != [len(node.outputs)]:
            # ONNX Runtime 1.31 reads beyond its lists here, and takes the process with it.
            raise ValueError(f"{node.op_type[:40]} names {len(node.outputs)} outputs, and says {numbers[:1]}")
        if name in node.numbers:
            raise ValueError(f"{node.op_type[:40]} has the attribute {name[:40]} twice")
        node.numbers[name] = numbers
        node.constant = tensor or node.constant
    if is_constant and len(attributes) != 1:
        raise ValueError(f"a constant has {len(attributes)} values instead of one")


def _attribute(
    message: memoryview, types: frozenset[int], *, is_constant: bool
) -> tuple[str, list[int], Tensor | None]:
    """Name, whole numbers and tensor of an attribute. Numbers of a Constant make a tensor."""
    name, numbers, tensor = "", list[int](), None
    floats, given = 0, set[int]()
    for number, value in parts(
        message, {1: BYTES, 3: VARINT, 5: BYTES, 6: BYTES, 10: BYTES, 11: BYTES, 22: BYTES, 23: BYTES}
    ):
        given |= {number} & _VALUE_FIELDS
        if len(given) > 1 or (number in (3, 5) and (numbers or tensor)):
            raise ValueError("an attribute has two values")
        if number == 1:
            name = text(value)
        elif number in (6, 11):
            raise ValueError("it holds a graph inside a graph")
        elif number in (22, 23):
            raise ValueError("it holds sparse weights, which no bundle needs")
        elif number in (5, 10):
            tensor = read_tensor(as_bytes(value), types)
        elif number == 3 and isinstance(value, int):
            numbers.append(_limited(signed(value), is_constant=is_constant))
        elif number == 8:
            every = [value] if isinstance(value, int) else varints(value)
            numbers += [_limited(signed(one), is_constant=is_constant) for one in every]
        elif number in (2, 7):
            floats += 1 if isinstance(value, int) else len(value) // 4
    if is_constant and tensor is None and name.startswith("value"):
        count, kind = (len(numbers), INT64) if numbers else (floats, FLOAT)
        values: list[float] | None = [*numbers] if 0 < len(numbers) <= _KEPT else None
        tensor = Tensor("", kind, [count], values)
    return name, numbers, tensor


def _limited(value: int, *, is_constant: bool) -> int:
    if not is_constant and abs(value) > MAX_ATTRIBUTE:
        raise ValueError(f"an attribute is {value}, beyond {MAX_ATTRIBUTE}")
    return value


def read_tensor(message: memoryview, types: frozenset[int]) -> Tensor:
    """A TensorProto's head; its data is counted, and read only where it is short.

    Data fields: 4 float, 5 int32, 6 string, 7 int64, 9 raw, 10 double, 11 uint64; 13 external, 14 where the data lie.
    """
    tensor = Tensor()
    data: list[tuple[int, int | memoryview]] = []
    head, num_bytes = 0, 0
    for number, value in parts(message, {2: VARINT, 8: BYTES, 9: BYTES, 13: BYTES, 14: VARINT}):
        size = 1 if isinstance(value, int) else len(value)
        if number in (4, 5, 6, 7, 9, 10, 11):
            data.append((number, value))
            num_bytes += size
            size = 0
        head += 2 + size
        if head > MAX_HEAD_BYTES:
            raise ValueError(f"a constant has more than {MAX_HEAD_BYTES} bytes besides its data")
        if number == 1:
            tensor.dims += [signed(value)] if isinstance(value, int) else varints(value)
        elif number == 2 and isinstance(value, int):
            tensor.data_type = value
        elif number == 8:
            tensor.name = text(value)
        elif number in (13, 14) and value != 0:
            raise ValueError("it keeps weights in another file, and all of a bundle's weights lie in its graphs")
    tensor.head_bytes = head
    check_type(tensor.data_type, types)
    if len(tensor.dims) > MAX_RANK:
        raise ValueError(f"a constant has {len(tensor.dims)} dimensions, more than {MAX_RANK}")
    # Two integers of 4 bits share a byte; nothing takes less. A number in the wire's own form takes ten at most.
    if any(size < 0 for size in tensor.dims) or tensor.num_elements > 2 * num_bytes:
        raise ValueError("a tensor is said to be larger than its data")
    if num_bytes > 10 * max(1, tensor.num_elements):
        raise ValueError("a tensor has more data than numbers")
    if tensor.num_elements <= _KEPT and tensor.data_type in _FORMATS:
        tensor.values = [one for number, value in data for one in _numbers(number, value, tensor.data_type)]
        least, most = WHOLE_RANGES.get(tensor.data_type, (-math.inf, math.inf))
        if any(one < least or one > most for one in tensor.values):
            # A reader keeps the lowest bits of it, which may be 0 or -1.
            raise ValueError("a constant has a number beyond its type")
    return tensor


def _numbers(number: int, value: int | memoryview, data_type: int) -> Iterator[float]:
    """The numbers of one data field."""
    code = {4: "f", 9: _FORMATS[data_type], 10: "d"}.get(number)
    if code is not None and not isinstance(value, int):
        size = struct.calcsize(code)
        yield from (one for (one,) in struct.iter_unpack("<" + code, value[: len(value) // size * size]))
    elif number in (4, 10) and isinstance(value, int):
        raw = value.to_bytes(8, "little")
        yield from struct.unpack_from("<f" if number == 4 else "<d", raw)
    elif number in (5, 7, 11):
        every = [signed(value)] if isinstance(value, int) else varints(value)
        yield from (one % 2**64 for one in every) if data_type == UINT64 else every


def read_value(message: memoryview, types: frozenset[int]) -> Value:
    """An input or output: of an allowed type; its name and its dimensions', which ONNX Runtime gives, are words."""
    found = Value()
    tensors = _inner(_inner([message], 2), 1)  # its type, if that is a tensor's
    for tensor in tensors:
        for number, value in parts(tensor, {1: VARINT}):
            if number == 1 and isinstance(value, int):
                check_type(value, types)
                found.data_type = value
    dims = _inner(_inner(tensors, 2), 1)
    for dim in dims[: MAX_RANK + 1]:
        size: int | None = None
        for number, value in parts(dim, {1: VARINT, 2: BYTES}):
            if number == 1 and isinstance(value, int):
                size = signed(value)
            elif number == 2:
                text(value)
        found.dims.append(size)
    if len(found.dims) > MAX_RANK:
        raise ValueError(f"an input or output has more than {MAX_RANK} dimensions")
    for number, value in parts(message, {1: BYTES}):
        if number == 1:
            found.name = text(value)
    return found


def _inner(messages: list[memoryview], number: int) -> list[memoryview]:
    """What the messages hold in their fields of this number."""
    return [as_bytes(value) for one in messages for found, value in parts(one, {number: BYTES}) if found == number]


def check_type(data_type: int, types: frozenset[int]) -> None:
    """Raise if a tensor's type is none that the graph may have."""
    if data_type not in types:
        raise ValueError(
            "it computes in float16, which only a bundle of precision fp16 may, on CUDA"
            if data_type == HALF
            else f"a tensor of type {data_type}"
        )


def parts(message: memoryview, kinds: dict[int, int]) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message, each of the kind it must have: readers skip a field of another kind without a word."""
    for number, kind, value in fields(message):
        if kinds.get(number, kind) != kind:
            raise ValueError(f"field {number} is of kind {kind}")
        yield number, value


def as_bytes(value: int | memoryview) -> memoryview:
    """The bytes of a field."""
    if isinstance(value, int):
        raise ValueError("expected bytes, got a number")  # noqa: TRY004 - a message's content, not an argument
    return value


def text(value: int | memoryview) -> str:
    """A name."""
    found = as_bytes(value)
    if len(found) > 4 * MAX_NAME:
        raise ValueError(f"a name of {len(found)} bytes, more than {MAX_NAME} characters")
    return bytes(found).decode()
