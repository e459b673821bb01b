"""What a fuzzer does to bytes, to JSON, to safetensors and to messages of protocol buffers."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

from fastfsl.bundle.protobuf import BYTES, FIXED32, FIXED64, VARINT, fields

BYTE_VALUES = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0x20, 0x22, 0x2E, 0x2F, 0x5C, 0x7B, 0x7D)
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 1000, 4096, 65535, 65536, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1,
    2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -2, -(2**31), -(2**63),
)  # fmt: skip
JSON_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", " ", "\ud800", "\0", "../x", "/etc/passwd", "manifest.json", "x" * 5000, "é", "0" * 64,
    [], {}, [[]], [None], {"": None}, 0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), 10**30, 10**400,
    *NUMBERS,
)  # fmt: skip
FLOATS = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 3.4e38, 1e-45, 1e30, -1.0, 65504.0)


def mutated_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """One to four of: flip, overwrite, insert, delete, repeat, cut, splice with another file."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(10)
        place = rng.randrange(len(found) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 64, 1000)), len(found) - place)
        if kind <= 2 and found:
            found[place % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 3 and found:
            found[place % len(found)] = rng.choice(BYTE_VALUES)
        elif kind == 4:
            number = struct.pack(rng.choice(("<I", ">I", "<Q", ">H", "<H")), 0)
            packed = (rng.choice(NUMBERS) % 2 ** (8 * len(number))).to_bytes(len(number), rng.choice(("little", "big")))
            found[place : place + len(number)] = packed
        elif kind == 5:
            found[place:place] = rng.randbytes(length or 1)
        elif kind == 6:
            del found[place : place + length]
        elif kind == 7:
            found[place:place] = found[place : place + length] * rng.choice((1, 2, 50))
        elif kind == 8:
            del found[place:]
        elif other:
            start = rng.randrange(len(other))
            found[place : place + length] = other[start : start + rng.choice((length, 64, len(other)))]
    return bytes(found)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """The value with one to three of its nodes replaced, removed, renamed, repeated or nested."""
    box = [json.loads(json.dumps(value))]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parent, key = rng.choice(list(_places(box)))
        kind = rng.randrange(8)
        if kind <= 3:
            parent[key] = rng.choice(JSON_VALUES)
        elif kind == 4 and parent is not box:
            del parent[key]
        elif kind == 5 and isinstance(parent, dict):
            name = rng.choice((key + " ", key.upper(), "surprise", rng.choice(list(parent))))
            parent[name] = parent.pop(key)
        elif kind == 6 and isinstance(parent, list) and parent is not box:
            small = isinstance(parent[key], int) or (isinstance(parent[key], str) and len(parent[key]) < 100)
            parent[key:key] = [parent[key]] * rng.choice((1, 5, 2000 if small else 1))
        elif kind == 7:
            deep: Any = parent[key]
            for _ in range(rng.choice((1, 40, 3000))):
                deep = [deep]
            parent[key] = deep
        elif isinstance(parent[key], int | float) and abs(parent[key]) < 2**64:
            parent[key] *= rng.choice((-1, 0, 0.5, 2, 1000))
    return box[0]


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """The value as JSON, now and then with a key that stands there twice, another encoding, or bytes changed."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    except RecursionError:  # nested for the writer as well
        text = "[" * 5000
    kind = rng.randrange(20)
    if kind == 0 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:].split(",", 1)[0].rstrip("}") + "," + text[1:]
    data = text.encode("utf-8" if kind != 1 else "utf-16", errors="surrogatepass")
    return mutated_bytes(data, rng) if kind == 2 else data


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header's length, its JSON, or the numbers behind it changed; the file stays one that a parser begins with."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    kind = rng.randrange(8)
    if kind <= 3:
        encoded = json_bytes(mutated_json(header, rng), rng)
    else:
        encoded = data[8 : 8 + length]
    if kind in (4, 5) and len(body) >= 4:
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(len(body) // 4) * 4
            body[place : place + 4] = struct.pack("<f", rng.choice(FLOATS))
    if kind == 6:
        body = bytearray(mutated_bytes(bytes(body), rng))
    claimed = len(encoded) if kind != 7 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", claimed) + encoded + bytes(body)


# Which fields of a message are messages: of an ONNX model the graph, its nodes, attributes, tensors and types.
_TENSOR: dict[int, Any] = {13: {}}
_TYPE: dict[int, Any] = {1: {2: {1: {}}}}
_NODE = {5: {5: _TENSOR}}
ONNX = {7: {1: _NODE, 5: _TENSOR, 11: {2: _TYPE}, 12: {2: _TYPE}, 13: {2: _TYPE}}, 8: {}}


def mutated_message(data: bytes, rng: random.Random, schema: dict[int, Any]) -> bytes:
    """A message with one to three fields changed, removed, repeated, swapped or moved; the lengths around them fit."""
    tree = _parsed(data, schema)
    lists = [entries for entries in _lists(tree) if entries]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        entries = rng.choice(lists)
        if not entries:
            continue
        place, kind = rng.randrange(len(entries)), rng.randrange(9)
        number, wire, value = entries[place]
        if kind == 0:
            del entries[place]
        elif kind == 1:
            entries.insert(place, entries[place])
        elif kind == 2:
            other = rng.randrange(len(entries))
            entries[place], entries[other] = entries[other], entries[place]
        elif kind == 3:
            entries[place] = (rng.choice((*range(1, 30), 2**29 - 1)), wire, value)
        elif kind == 4:
            donor = rng.choice(lists)
            if donor:
                entries.insert(place, copy.deepcopy(rng.choice(donor)))  # not a list into itself
        elif wire == VARINT:
            entries[place] = (number, wire, rng.choice(NUMBERS) % 2**64)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
            entries[place] = (number, wire, int.from_bytes(rng.randbytes(size), "little"))
        elif isinstance(value, bytes):
            entries[place] = (number, wire, _changed(value, rng))
    return _written(tree)


def _changed(value: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0 and len(value) >= 8:
        place = rng.randrange(len(value) // 8) * 8
        return (
            value[:place]
            + struct.pack("<q", rng.choice([n for n in NUMBERS if -(2**63) <= n < 2**63]))
            + value[place + 8 :]
        )
    if kind == 1 and len(value) >= 4:
        place = rng.randrange(len(value) // 4) * 4
        return value[:place] + struct.pack("<f", rng.choice(FLOATS)) + value[place + 4 :]
    if kind == 2:
        words = (
            b"Loop",
            b"Expand",
            b"Reshape",
            b"Gather",
            b"Slice",
            b"x",
            b"",
            b"images",
            b"Conv",
            b"Pad",
            b"com.microsoft",
        )
        return rng.choice(words)
    return mutated_bytes(value, rng)


def _parsed(data: bytes, schema: dict[int, Any]) -> list[Any]:
    found: list[Any] = []
    for number, wire, value in fields(memoryview(data)):
        if isinstance(value, int):
            found.append((number, wire, value))
        elif number in schema:
            found.append((number, wire, _parsed(bytes(value), schema[number])))
        else:
            found.append((number, wire, bytes(value)))
    return found


def _lists(tree: list[Any]) -> list[list[Any]]:
    found = [tree]
    for _, _, value in tree:
        if isinstance(value, list):
            found += _lists(value)
    return found


def _written(tree: list[Any]) -> bytes:
    parts = []
    for number, wire, value in tree:
        parts.append(_varint(number << 3 | wire))
        if wire == VARINT:
            parts.append(_varint(value))
        elif wire == BYTES:
            content = _written(value) if isinstance(value, list) else value
            parts += [_varint(len(content)), content]
        else:
            parts.append(value.to_bytes(4 if wire == FIXED32 else 8, "little"))
    return b"".join(parts)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (parent, key) in a JSON value, however deep."""
    found, waiting = [], [value]
    while waiting:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        found += [(parent, key) for key in keys]
        waiting += [parent[key] for key in keys]
    return found
