"""The bytes of an open file, `io.BytesIO`, an upload: whatever has a `read`."""

from __future__ import annotations

from io import BytesIO
from threading import Lock
from typing import Any

from fastfsl.errors import DataError, ResourceError, resource_error
from fastfsl.images.limits import MAX_FILE_BYTES

_AT_ONCE = 2**20

# The same object may be handed over twice: its position must not be moved by two threads at a time.
_moving = Lock()


def read_object(source: Any, name: str) -> bytes:  # noqa: ANN401 - anything that has a `read`
    """All its bytes from the beginning, its position being left as it was; of what cannot seek, those that are left.

    Raises:
        DataError: it is closed, open as text, holds more than MAX_FILE_BYTES, or fails.
        ResourceError: the machine cannot read it at the moment.
    """
    try:
        if isinstance(source, BytesIO):
            data = source.getvalue()
            _check_length(len(data), name)
            return data
        if not _seekable(source):
            return _read(source, name)
        with _moving:
            position = source.tell()
            source.seek(0)
            try:
                return _read(source, name)
            finally:
                source.seek(position)
    except (DataError, ResourceError):
        raise
    except Exception as error:  # whatever somebody's object raises
        raise resource_error(error, f"read the image {name}") or DataError(
            f"{name}: it cannot be read ({type(error).__name__}: {error}); expected a file open for reading bytes"
        ) from error


def _seekable(source: Any) -> bool:  # noqa: ANN401 - as above
    seekable = getattr(source, "seekable", None)
    return hasattr(source, "seek") and hasattr(source, "tell") and (seekable is None or bool(seekable()))


def _read(source: Any, name: str) -> bytes:  # noqa: ANN401 - as above
    parts: list[bytes] = []
    length = 0
    while True:
        part = source.read(min(_AT_ONCE, MAX_FILE_BYTES + 1 - length))
        if not isinstance(part, bytes | bytearray | memoryview):
            if hasattr(part, "close") and hasattr(part, "send"):  # a coroutine that nobody would await
                part.close()
            raise DataError(
                f"{name}: its read() gave {type(part).__name__}, not bytes; open files with mode 'rb', and await what "
                "is asynchronous first"
            )
        if not len(part):
            return b"".join(parts)
        parts.append(bytes(part))
        length += len(part)
        _check_length(length, name)


def _check_length(length: int, name: str) -> None:
    if length > MAX_FILE_BYTES:
        raise DataError(f"{name}: expected an image of at most {MAX_FILE_BYTES} bytes, got more; save it smaller")
