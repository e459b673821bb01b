"""Just enough of the protocol buffers' wire format to walk through a message that a stranger wrote.

A message is a row of fields, each a number, a kind and a value. Nothing is copied: a value of bytes is a view.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# Field numbers have 29 bits.
_MAX_KEY = 2**32


def fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Number, kind and value of each field, in their order. The value is an int, or of `BYTES` a view.

    Raises:
        ValueError: the bytes are no message. Groups, which nobody writes any more, count as such.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if number == 0 or key >= _MAX_KEY:
            raise ValueError("a field has no valid number")
        value: int | memoryview
        if kind == VARINT:
            value, position = _varint(message, position)
        elif kind == BYTES:
            length, position = _varint(message, position)
            value = message[position : position + length]
            position += length
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
            value = int.from_bytes(message[position : position + size], "little")
            position += size
        else:
            raise ValueError(f"a field of kind {kind}")
        if position > end:
            raise ValueError("a field is cut off")
        yield number, kind, value


def varints(packed: memoryview) -> Iterator[int]:
    """The numbers of a packed field, as signed 64-bit integers.

    Raises:
        ValueError: the last one is cut off.
    """
    position = 0
    while position < len(packed):
        value, position = _varint(packed, position)
        yield signed(value)


def signed(value: int) -> int:
    """A varint as the signed 64-bit integer that it stands for."""
    return value - 2**64 if value >= 2**63 else value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while position < len(data) and shift < 70:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, position
    raise ValueError("a number is cut off or too long")
