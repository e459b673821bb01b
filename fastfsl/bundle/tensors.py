"""Arrays and a few words about them in one safetensors file: the frame of the plan, the read-out and the kernels."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl.bundle.untrusted import AGAIN, MAX_FILE_BYTES, NEWER, read_regular, strict_json
from fastfsl.errors import BundleError
from fastfsl.files import staged_file

VERSION = "1"
_DTYPES = {"F32": "float32 (F32)", "F16": "float16 (F16)", "U16": "uint16 (U16)"}

# A header holds a short entry for each array: twelve in a plan.
MAX_HEADER_BYTES = 64 * 2**10


def read_tensors(
    path: str | os.PathLike[str],
    file_format: str,
    what: str,
    data: bytes | None = None,
    dtypes: Collection[str] = ("F32",),
) -> tuple[dict[str, str], dict[str, np.ndarray[Any, Any]]]:
    """Read what ``write_tensors`` wrote, believing nothing.

    Args:
        path: the file; with ``data`` only what messages call it.
        file_format: the format that its metadata must name.
        what: what messages call such a file, e.g. "flow plan".
        data: the file's bytes, if they were read already.
        dtypes: of the arrays, by their names in safetensors.

    Returns:
        The metadata and the arrays.

    Raises:
        BundleError: the file is missing, damaged, of another format or of an unknown version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    data = read_regular(path, MAX_FILE_BYTES) if data is None else data
    metadata, header = _described(data, path, file_format, what)
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in dtypes:
            allowed = " or ".join(_DTYPES[dtype] for dtype in dtypes)
            raise BundleError(f"{path}: {name} must be {allowed}; {AGAIN}")
    try:
        return metadata, load(data)
    except (SafetensorError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: {error}; {AGAIN}") from error


def read_shapes(
    path: str | os.PathLike[str], file_format: str, what: str, data: bytes
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata and shapes of what ``write_tensors`` wrote, as the header says them; arguments as for ``read_tensors``.

    Raises:
        BundleError: the header is damaged, of another format or of an unknown version.
    """
    path = Path(path)
    metadata, header = _described(data, path, file_format, what)
    shapes = {name: entry.get("shape") if isinstance(entry, dict) else None for name, entry in header.items()}
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
            raise BundleError(f"{path}: {name} has no shape; {AGAIN}")
    return metadata, {name: tuple(shape or ()) for name, shape in shapes.items()}


def write_tensors(
    path: str | os.PathLike[str],
    file_format: str,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write arrays and metadata as safetensors, atomically; equal contents give equal bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    length = struct.unpack("<Q", data[:8])[0]
    # safetensors writes its metadata in random order; putting it in here keeps the bytes, and so the hash, the same.
    about = {"format": file_format, "version": VERSION, **metadata}
    header = json.dumps({"__metadata__": about, **json.loads(data[8 : 8 + length])}, separators=(",", ":"))
    header += " " * (-len(header) % 8)
    with staged_file(Path(path)) as partial:
        partial.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + length :])


def _described(data: bytes, path: Path, file_format: str, what: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata of a file of the format, and the entry of each array."""
    header = _header(data, path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != file_format:
        raise BundleError(f"{path}: not a fastfsl {what}; {AGAIN}")
    if metadata.get("version") != VERSION:
        raise BundleError(f"{path}: {what} of version {metadata.get('version')!r}, expected {VERSION!r}; {NEWER}")
    return metadata, header


def _header(data: bytes, path: Path) -> dict[str, Any]:
    """The header of a safetensors file, its length bounded before it is parsed."""
    if len(data) < 8:
        raise BundleError(f"{path}: expected a safetensors file, got {len(data)} bytes; {AGAIN}")
    length = struct.unpack("<Q", data[:8])[0]
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise BundleError(f"{path}: the header claims {length} bytes, more than it has or may have; {AGAIN}")
    return strict_json(data[8 : 8 + length], path)
