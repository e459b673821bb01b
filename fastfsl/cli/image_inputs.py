"""Which images a command is to read: files, folders and lists of them, one after the other and in one order."""

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

from fastfsl.errors import DataError, ResourceError, resource_error

STDIN = Path("-")

# Longer than any path of any system; a list with a longer line is no list of paths.
_MAX_LINE_BYTES = 2**16


def find_images(paths: Iterable[Path]) -> list[Path]:
    """``walk_images`` at once."""
    return list(walk_images(paths))


def walk_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as they are, and of each folder every visible image file below it, in natural order.

    No more than the names in one folder, and in those above it, are held.

    Raises:
        DataError: a folder holds no image, or cannot be read.
        ResourceError: the machine cannot read it at the moment.
    """
    for path in paths:
        if not path.is_dir():
            yield path  # the reader says what is wrong with it, if anything
            continue
        empty = True
        for file in _below(path):
            empty = False
            yield file
        if empty:
            raise DataError(f"{path}: no image in this folder; expected files such as .jpg or .png")


def listed_images(source: Path) -> Iterator[Path]:
    """The paths in a file, one a line; ``-`` is the standard input. Empty lines do not count.

    No more than one line is held, however large the file.

    Raises:
        DataError: there is no such file, it cannot be read, or it is no list of paths.
        ResourceError: the machine cannot read it at the moment.
    """
    try:
        with _opened(source) as lines:
            for number in count(1):
                line = lines.readline(_MAX_LINE_BYTES)
                if not line:
                    return
                if b"\0" in line or (len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n")):
                    raise DataError(f"--list {source}: line {number} is no path; expected a text file, one path a line")
                name = line.rstrip(b"\r\n")
                if name:
                    yield Path(os.fsdecode(name))
    except OSError as error:
        raise _unreadable(
            error, f"--list {source}", f"{error.strerror or error}; expected a file with one path a line"
        ) from error


def _opened(source: Path) -> BinaryIO:
    if source != STDIN:
        return source.open("rb")
    if sys.stdin is None or sys.stdin.closed:
        raise DataError("--list -: the standard input is closed; pipe paths into it, one a line")
    return sys.stdin.buffer


def _unreadable(error: OSError, what: str, reason: str) -> DataError | ResourceError:
    return resource_error(error, f"read {what}") or DataError(f"{what}: {reason}")


def _below(folder: Path) -> Iterator[Path]:
    from fastfsl.data.folder import IMAGE_EXTENSIONS
    from fastfsl.data.natural_order import natural_key

    try:
        with os.scandir(folder) as found:
            # A folder sorts as the beginning of the paths below it.
            entries = [(f"{entry.name}/" if entry.is_dir() else entry.name, entry) for entry in found]
    except OSError as error:
        raise _unreadable(error, str(folder), f"the folder cannot be read ({error.strerror or error})") from error
    for name, entry in sorted(entries, key=lambda entry: natural_key(entry[0])):
        if name.startswith("."):
            continue
        path = folder / entry.name
        if name.endswith("/"):
            if not entry.is_symlink():  # which may lead back here
                yield from _below(path)
        elif path.suffix.lower() in IMAGE_EXTENSIONS and entry.is_file():
            yield path
