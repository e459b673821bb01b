"""Mutants of small pictures in every format and mode that is read, and what is done with each."""

from __future__ import annotations

import io
import random
import struct
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, features

from fastfsl.errors import FastFSLError
from fastfsl.images import MAX_PIXELS, Preprocessing
from fastfsl.images.prepared import PREPROCESS
from tests.fuzz.mutation import NUMBERS, mutated_bytes

PREPROCESSINGS = tuple(
    Preprocessing(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize_mode=mode)
    for size, mode in (((32, 32), "shortest"), ((24, 40), "shortest"), ((32, 32), "longest"), ((32, 16), "squash"))
)
_SIGNED = b"\x89PNG\r\n\x1a\n"


@cache
def seeds() -> tuple[tuple[str, bytes], ...]:
    """(extension, bytes) of each picture that mutants are made from."""
    y, x = np.mgrid[:37, :53]
    colours = np.stack([x * 4, y * 6, x * y // 8], axis=2).astype(np.uint8)
    rgb = Image.fromarray(colours)
    alpha = Image.fromarray(np.dstack([colours, (x * 3).astype(np.uint8)]))
    deep = Image.fromarray((x * y * 30).astype(np.uint16))
    palette = rgb.quantize(16)
    frames = [rgb, rgb.rotate(90), rgb.rotate(180)]
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("jpg", rgb, {}),
        ("jpg", rgb, {"progressive": True, "subsampling": 2, "quality": 30}),
        ("jpg", rgb.convert("L"), {"optimize": True}),
        ("jpg", rgb.convert("CMYK"), {}),
        ("jpg", rgb, {"exif": _exif(6), "icc_profile": b"no profile" * 20, "comment": b"hello"}),
        ("png", rgb, {}),
        ("png", rgb, {"exif": _exif(8), "dpi": (72, 72)}),
        ("png", alpha, {}),
        ("png", rgb.convert("L"), {"transparency": 5}),
        ("png", alpha.convert("LA"), {}),
        ("png", rgb.convert("1"), {}),
        ("png", palette, {"transparency": 3}),
        ("png", deep, {}),
        ("png", rgb, {"save_all": True, "append_images": frames}),
        ("gif", palette, {"transparency": 2}),
        ("gif", rgb, {"save_all": True, "append_images": frames}),
        ("bmp", rgb, {}),
        ("bmp", palette, {}),
        ("bmp", rgb.convert("1"), {}),
        ("tiff", rgb, {}),
        ("tiff", rgb, {"compression": "tiff_lzw"}),
        ("tiff", rgb, {"compression": "tiff_adobe_deflate"}),
        ("tiff", rgb, {"compression": "jpeg"}),
        ("tiff", rgb.convert("1"), {"compression": "group4"}),
        ("tiff", deep, {}),
        ("tiff", rgb.convert("F"), {}),
        ("tiff", rgb.convert("I"), {}),
        ("tiff", rgb.convert("CMYK"), {}),
        ("tiff", rgb.convert("LAB"), {}),
        ("tiff", rgb, {"save_all": True, "append_images": frames, "exif": _exif(3)}),
        ("ppm", rgb, {}),
        ("ppm", rgb.convert("L"), {}),
        ("ppm", rgb.convert("1"), {}),
        ("ppm", deep, {}),
    ]
    if features.check("webp"):
        made += [("webp", rgb, {}), ("webp", alpha, {"lossless": True, "exif": _exif(5)})]
        made += [("webp", rgb, {"save_all": True, "append_images": frames})]
    if features.check("jpg_2000"):
        made += [("jp2", rgb, {}), ("jp2", rgb.convert("L"), {"irreversible": True}), ("jp2", alpha, {})]
    if features.check("avif"):
        made += [("avif", rgb, {"speed": 10}), ("avif", alpha, {"speed": 10})]
    return tuple(_encoded(*one) for one in made)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that are, or say they are, very large pictures, as large as Pillow's own limits and ours allow."""
    side = int(MAX_PIXELS**0.5)
    # Grey of 8, 16 and 1 bit, RGB, RGBA; then too large ones, and one without pixels.
    for size, depth, colour, row in (
        (side, 8, 0, side),
        (side, 16, 0, 2 * side),
        (side // 8 * 8, 1, 0, side // 8),
        (side, 8, 2, 3 * side),
        (side, 8, 6, 4 * side),
        (13_400, 8, 0, 13_400),
        (60_000, 1, 0, 7_500),
        (2**31 - 1, 8, 6, 4),
        (0, 8, 2, 0),
    ):
        yield _png(size, depth, colour, row)
    yield _encoded("png", Image.new("L", (60_000, 1)), {})
    yield _encoded("png", Image.new("RGB", (1, 60_000)), {})
    black = Image.new("RGB", (side, side))
    yield _encoded("jpg", black, {"exif": _exif(6)})
    yield _encoded("jpg", black, {"progressive": True, "subsampling": 0, "exif": _exif(6)})
    print_side = int((MAX_PIXELS * 3 // 4) ** 0.5)
    for options in ({"progressive": True, "subsampling": 0}, {"exif": _exif(6)}):
        yield _encoded("jpg", Image.new("CMYK", (print_side, print_side)), options)
    yield _encoded("tiff", black, {"compression": "tiff_adobe_deflate", "exif": _exif(6)})
    yield _encoded("gif", Image.new("P", (side, side)), {"transparency": 0})
    if features.check("webp"):
        yield _encoded("webp", black.crop((0, 0, min(side, 16_383), min(side, 16_383))), {"method": 0})
    if features.check("jpg_2000"):
        yield _encoded("jp2", black, {})
    if features.check("avif"):
        yield _encoded("avif", black, {"speed": 10})


def _png(side: int, depth: int, colour: int, row: int) -> tuple[str, bytes]:
    """A black square that is to be turned; its rows are compressed one by one, so that none of it has to be held."""
    stream, line = zlib.compressobj(1), b"\0" * (row + 1)
    body = b"".join(stream.compress(line) for _ in range(min(side, 13_300))) + stream.flush()
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    exif = _exif(6).removeprefix(b"Exif\0\0")
    chunks = ((b"IHDR", header), (b"eXIf", exif), (b"IDAT", body), (b"IEND", b""))
    return "png", _SIGNED + b"".join(_chunk(name, data) for name, data in chunks)


def mutant(seed: int, index: int) -> tuple[str, bytes]:
    """Extension and bytes of one mutant; the same numbers give the same one."""
    rng = random.Random(f"images {seed} {index}")
    extension, data = rng.choice(seeds())
    if rng.random() < 0.5:
        # Sizes, offsets and counts stand near the beginning; both byte orders are in use.
        found = bytearray(data)
        for _ in range(rng.choice((1, 1, 2))):
            size = rng.choice((1, 2, 4))
            place = rng.randrange(min(len(found), rng.choice((40, 200, 10**6))))
            found[place : place + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(
                size, rng.choice(("little", "big"))
            )
        data = bytes(found)
    else:
        data = mutated_bytes(data, rng, rng.choice(seeds())[1])
    if rng.random() < 0.8 and data.startswith(_SIGNED):
        data = _with_sums(data)
    if rng.random() < 0.1:
        extension = rng.choice(("jpg", "png", "txt", "gif", "tif"))
    return extension, data


def exercise(extension: str, data: bytes, preprocessings: tuple[Preprocessing, ...] = PREPROCESSINGS) -> None:
    """Prepare a picture every way, from bytes and from a file.

    Raises:
        FastFSLError: it was refused at least once.
        AssertionError: it gave something that is no picture.
    """
    refused: list[FastFSLError] = []
    with tempfile.NamedTemporaryFile(suffix=f".{extension}") as file:
        file.write(data)
        file.flush()
        number = 0
        for preprocessing in preprocessings:
            for prepare in PREPROCESS.values():
                number += 1
                try:
                    pixels = prepare(data if number % 2 else file.name, preprocessing)
                except FastFSLError as error:
                    refused.append(error)
                    if len(refused) == number == 2:
                        raise  # what neither way takes once, it takes never
                    continue
                assert isinstance(pixels, np.ndarray), "no array"
                assert pixels.shape == (*preprocessing.image_size, 3), "no picture"
                assert pixels.dtype == np.uint8, "no picture"
    if refused:
        raise refused[0]


def _encoded(extension: str, image: Image.Image, options: dict[str, Any]) -> tuple[str, bytes]:
    target = io.BytesIO()
    image.save(target, {"jpg": "JPEG", "jp2": "JPEG2000", "tiff": "TIFF"}.get(extension, extension.upper()), **options)
    return extension, target.getvalue()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker"
    return exif.tobytes()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _with_sums(data: bytes) -> bytes:
    """A PNG file whose check sums fit again, so that what was altered is read."""
    found, place = bytearray(data), 8
    while place + 12 <= len(found):
        (length,) = struct.unpack(">I", found[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(found):
            break
        found[end : end + 4] = struct.pack(">I", zlib.crc32(found[place + 4 : end]))
        place = end + 4
    return bytes(found)
