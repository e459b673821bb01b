"""int8 products rewritten with unsigned weights, whose sums no processor cuts off, in about 1.3 times the time.

Weights w in -128..127 become w + 128 in 0..255 with a zero point of 128, which is the same product. Processors with
AVX2 and without VNNI compute it in 32 bits. ONNX Runtime has an option that does the same (session.x64quantprecision),
but it fails where several products share their weights, as the steps of a flow do. Standard library and numpy alone.
"""

from __future__ import annotations

import numpy as np

from fastfsl.bundle.protobuf import BYTES, FIXED32, FIXED64, VARINT, fields

# Operators that exporters write, and which input is the zero point of their weights; input 1 are the weights.
_ZERO_POINT = {"MatMulIntegerToFloat": 5, "QAttention": 7}
_MICROSOFT = b"com.microsoft"
_UINT8, _INT8 = 2, 3
# The fields of ONNX's messages that are looked at.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OP_TYPE, _NODE_DOMAIN = 1, 4, 7
_TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 2, 8, 9


def with_unsigned_weights(model: bytes) -> bytes:
    """The same graph, the int8 weights of its products being unsigned.

    Args:
        model: a serialised ONNX model.

    Raises:
        ValueError: the bytes are no message, or a product has a zero point already.
    """
    return b"".join(
        _field(number, kind, _graph(value) if number == _MODEL_GRAPH and not isinstance(value, int) else value)
        for number, kind, value in fields(memoryview(model))
    )


def _graph(message: memoryview) -> bytes:
    parts = [(number, kind, value) for number, kind, value in fields(message)]
    nodes = [value for number, _, value in parts if number == _GRAPH_NODE and not isinstance(value, int)]
    names = {name for node in nodes for name in _texts(node, _NODE_INPUT)}
    weights = {_texts(node, _NODE_INPUT)[1] for node in nodes if _is_product(node)}
    zero = b"zero_of_unsigned_weights"
    while zero in names:
        zero += b"_"
    written = [_field(_GRAPH_INITIALIZER, BYTES, _zero_point(zero))]
    for number, kind, value in parts:
        if number == _GRAPH_NODE and not isinstance(value, int) and _is_product(value):
            written.append(_field(number, kind, _product(value, zero)))
        elif number == _GRAPH_INITIALIZER and not isinstance(value, int):
            written.append(_field(number, kind, _tensor(value, weights)))
        else:
            written.append(_field(number, kind, value))
    return b"".join(written)


def _is_product(node: memoryview) -> bool:
    return _texts(node, _NODE_DOMAIN) == [_MICROSOFT] and _operator(node) in _ZERO_POINT


def _operator(node: memoryview) -> str:
    return b"".join(_texts(node, _NODE_OP_TYPE)).decode(errors="replace")


def _product(node: memoryview, zero: bytes) -> bytes:
    inputs, index = _texts(node, _NODE_INPUT), _ZERO_POINT[_operator(node)]
    inputs += [b""] * (index + 1 - len(inputs))
    if inputs[index]:
        raise ValueError(f"{_operator(node)} has a zero point of its weights")
    inputs[index] = zero
    others = [_field(*part) for part in fields(node) if part[0] != _NODE_INPUT]
    return b"".join([_field(_NODE_INPUT, BYTES, name) for name in inputs] + others)


def _tensor(message: memoryview, weights: set[bytes]) -> bytes | memoryview:
    """An initialiser, unsigned if it holds int8 weights of a product."""
    parts = list(fields(message))
    if _texts(message, _TENSOR_NAME)[-1:] == [] or _texts(message, _TENSOR_NAME)[-1] not in weights:
        return message
    if [value for number, _, value in parts if number == _TENSOR_TYPE][-1:] != [_INT8]:
        return message
    written = []
    for number, kind, value in parts:
        if number == _TENSOR_TYPE:
            written.append(_field(number, VARINT, _UINT8))
        elif number == _TENSOR_RAW and not isinstance(value, int):
            written.append(_field(number, kind, (np.frombuffer(value, np.uint8) ^ 0x80).tobytes()))
        else:
            written.append(_field(number, kind, value))
    return b"".join(written)


def _zero_point(name: bytes) -> bytes:
    return b"".join(
        [
            _field(_TENSOR_TYPE, VARINT, _UINT8),
            _field(_TENSOR_NAME, BYTES, name),
            _field(_TENSOR_RAW, BYTES, b"\x80"),
        ]
    )


def _texts(message: memoryview, number: int) -> list[bytes]:
    """The fields of this number, as bytes."""
    return [bytes(value) for found, _, value in fields(message) if found == number and not isinstance(value, int)]


def _field(number: int, kind: int, value: int | bytes | memoryview) -> bytes:
    key = _varint(number << 3 | kind)
    if not isinstance(value, int):
        return b"".join([key, _varint(len(value)), value])
    if kind in (FIXED32, FIXED64):
        return key + value.to_bytes(4 if kind == FIXED32 else 8, "little")
    return key + _varint(value)


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])
