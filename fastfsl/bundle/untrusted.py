"""Reading what a stranger wrote: bounded files, and JSON that means one thing only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastfsl.errors import BundleError, memory_error, resource_error

# The remedies at the end of a message.
AGAIN = "the bundle is damaged: export it again"
NEWER = "it was made by a newer fastfsl: upgrade fastfsl, or export it again with this version"

# ONNX cannot hold more in one file, and nothing else in a bundle is nearly as large.
MAX_FILE_BYTES = 2 * 2**30
MAX_JSON_DEPTH = 32
# Values in a JSON file: a manifest of 16 MiB has a quarter million digests of 64 digits at most.
MAX_JSON_VALUES = 2**19

_CHUNK = 2**20
# Beginnings of the files that stand for large ones, and how to get those.
_POINTERS = {b"version https://git-lfs.github.com/spec/": "git lfs pull", b"/annex/objects/": "git annex get"}
_MAX_POINTER_BYTES = 1024
# What an operating system does not know it does without: there the kind of the file alone is checked.
_NO_FOLLOW, _NO_WAIT, _BINARY = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
# How opening a link, a socket or a device without a driver, and a folder ends.
_OTHER_KIND = (errno.ELOOP, errno.ENXIO, errno.EISDIR)


def read_regular(path: Path, max_bytes: int, expected_size: int | None = None, *, lies_at: Path | None = None) -> bytes:
    """The bytes of a regular file that is no link and not larger than allowed; nothing is read of any other.

    Args:
        path: the file, as messages name it.
        max_bytes: its largest size.
        expected_size: its very size; None: any.
        lies_at: where it is, if `path` leads there by links that may be followed.

    Raises:
        BundleError: the file is missing, of another kind or size, too large, or cannot be read.
        ResourceError: the machine cannot read it at the moment.
    """
    with _opened(path, max_bytes, expected_size, lies_at) as (file, size):
        return file.read(size + 1)


def hash_regular(
    path: Path, max_bytes: int, expected_size: int | None = None, *, lies_at: Path | None = None
) -> tuple[int, str]:
    """Size in bytes and sha256 in hex of such a file, read piece by piece; all else as for `read_regular`."""
    digest, found = hashlib.sha256(), 0
    with _opened(path, max_bytes, expected_size, lies_at) as (file, size):
        while found <= size and (chunk := file.read(_CHUNK)):
            digest.update(chunk)
            found += len(chunk)
    return found, digest.hexdigest()


@contextlib.contextmanager
def _opened(
    path: Path, max_bytes: int, expected_size: int | None, lies_at: Path | None
) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size. The kind is asked of what was opened, so nothing can be exchanged in between."""
    try:
        # Without waiting for a writer at the other end of a pipe, and not through a link.
        descriptor = os.open(path if lies_at is None else lies_at, os.O_RDONLY | _NO_FOLLOW | _NO_WAIT | _BINARY)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _not_regular(path)
            if expected_size is not None and status.st_size != expected_size:
                _refuse_pointer(path, file, status.st_size)
                raise wrong_size(path, expected_size, status.st_size)
            if status.st_size > max_bytes:
                raise BundleError(f"{path}: {status.st_size} bytes, more than the {max_bytes} allowed; {AGAIN}")
            yield file, status.st_size
    except MemoryError as error:
        raise memory_error(f"read {path}") from error
    except FileNotFoundError as error:
        raise BundleError(f"{path}: the file is missing; {AGAIN}") from error
    except OSError as error:
        if error.errno in _OTHER_KIND:
            raise _not_regular(path) from error
        raise resource_error(error, f"read {path}") or BundleError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _refuse_pointer(path: Path, file: BinaryIO, size: int) -> None:
    """Say so if a file is what git keeps in place of a large one that was not downloaded."""
    head = file.read(_MAX_POINTER_BYTES) if size <= _MAX_POINTER_BYTES else b""
    for beginning, remedy in _POINTERS.items():
        if head.startswith(beginning):
            raise BundleError(f"{path}: a pointer of {size} bytes to the file, not the file itself; run `{remedy}`")


def _not_regular(path: Path) -> BundleError:
    return BundleError(f"{path}: expected a regular file, not a folder, link or device; {AGAIN}")


def wrong_size(path: Path, expected: int, found: int) -> BundleError:
    """The error for a file of another size than the manifest records."""
    return BundleError(f"{path}: truncated or altered: expected {expected} bytes, got {found}; {AGAIN}")


def strict_json(
    data: bytes,
    path: str | os.PathLike[str],
    *,
    max_depth: int | None = MAX_JSON_DEPTH,
    max_values: int = MAX_JSON_VALUES,
) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN, infinities, lone surrogates or deep nesting.

    Args:
        data: bytes of the file.
        path: what messages call it.
        max_depth: lists and objects in one another; None: whoever reads the object bounds that, numbers and surrogates.
        max_values: signs that begin or part values; one of them costs up to a hundred bytes of memory.

    Raises:
        BundleError: it is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key appears twice")
        return values

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not a number")

    values = sum(data.count(sign) for sign in b",:[{")
    if values > max_values:
        raise BundleError(f"{path}: {values} JSON values, more than the {max_values} allowed; {AGAIN}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
        if max_depth is not None:
            _check_json(value, max_depth)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path}: expected a JSON object; {AGAIN}")
    return value


def _check_json(value: object, depth: int) -> None:
    if depth < 0:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(key, depth)
            _check_json(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, depth - 1)
    elif isinstance(value, str):
        value.encode("utf-8")  # raises on a lone surrogate
    elif isinstance(value, int | float) and not abs(value) < 2**63:
        raise ValueError("a number is too large")


def is_positive(value: object) -> bool:
    """A finite number above 0; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_fraction(value: object) -> bool:
    """A number from 0 to 1; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
