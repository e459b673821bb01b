"""Which images a command is to read: files, folders and lists of them, one after the other and in one order."""

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastfsl.errors import DataError, ResourceError, resource_error

if TYPE_CHECKING:
    from fastfsl.data import Skipped

STDIN = Path("-")

# Longer than any path of any system; a list with a longer line is no list of paths.
_MAX_LINE_BYTES = 2**16


def find_images(paths: Iterable[Path]) -> list[Path]:
    """``walk_images`` at once."""
    return list(walk_images(paths))


def walk_images(paths: Iterable[Path], skipped: "Skipped | None" = None) -> Iterator[Path]:
    """Files as they are, and of each folder every image file below it, as `fastfsl.data.walk` finds them.

    No more than the names in one folder, and in those above it, are held.

    Args:
        paths: files and folders.
        skipped: counts what is passed over in folders.

    Raises:
        DataError: a folder holds no image, or cannot be read.
        ResourceError: the machine cannot read it at the moment.
    """
    from fastfsl.data.skipped import Skipped
    from fastfsl.data.walk import walk

    for path in paths:
        if not path.is_dir():
            yield path  # the reader says what is wrong with it, if anything
            continue
        empty = True
        here = Skipped()
        for file in walk(path, here):
            empty = False
            yield file
        if empty:
            lost = f"; it has {here.words(here.unexpected)}" if here.unexpected else ""
            raise DataError(f"{path}: no image in this folder; expected files such as .jpg or .png{lost}")
        if skipped is not None:
            skipped.update(here)


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
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                name = line.rstrip(b"\r\n")
                if name:
                    yield _listed_path(os.fsdecode(name))
    except OSError as error:
        raise _unreadable(
            error, f"--list {source}", f"{error.strerror or error}; expected a file with one path a line"
        ) from error


def _listed_path(name: str) -> Path:
    r"""The path as it is listed; one with \ for / where only that one is there, as lists from Windows have it."""
    from fastfsl.images import with_slashes

    path, other = Path(name), with_slashes(name)
    if other != name and not os.path.lexists(name) and os.path.lexists(other):
        return Path(other)
    return path


def _opened(source: Path) -> BinaryIO:
    if source != STDIN:
        return source.open("rb")
    if sys.stdin is None or sys.stdin.closed:
        raise DataError("--list -: the standard input is closed; pipe paths into it, one a line")
    return sys.stdin.buffer


def _unreadable(error: OSError, what: str, reason: str) -> DataError | ResourceError:
    return resource_error(error, f"read {what}") or DataError(f"{what}: {reason}")
