"""Which images a command is to read: files, folders and lists of them, one after the other and in one order."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastfsl.errors import DataError

STDIN = Path("-")


def find_images(paths: Iterable[Path]) -> list[Path]:
    """``walk_images`` at once."""
    return list(walk_images(paths))


def walk_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as they are, and of each folder every visible image file below it, in natural order.

    No more than the names in one folder, and in those above it, are held.

    Raises:
        DataError: a folder holds no image, or cannot be read.
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

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    try:
        with sys.stdin.buffer if source == STDIN else source.open("rb") as lines:
            for line in lines:
                name = line.rstrip(b"\r\n")
                if name:
                    yield Path(os.fsdecode(name))
    except OSError as error:
        raise DataError(f"--list {source}: {error.strerror or error}; expected a file with one path a line") from error


def _below(folder: Path) -> Iterator[Path]:
    from fastfsl.data.folder import IMAGE_EXTENSIONS
    from fastfsl.data.natural_order import natural_key

    try:
        with os.scandir(folder) as found:
            # A folder sorts as the beginning of the paths below it.
            entries = [(f"{entry.name}/" if entry.is_dir() else entry.name, entry) for entry in found]
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read ({error.strerror or error})") from error
    for name, entry in sorted(entries, key=lambda entry: natural_key(entry[0])):
        if name.startswith("."):
            continue
        path = folder / entry.name
        if name.endswith("/"):
            if not entry.is_symlink():  # which may lead back here
                yield from _below(path)
        elif path.suffix.lower() in IMAGE_EXTENSIONS and entry.is_file():
            yield path
