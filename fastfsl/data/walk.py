"""The one walk through folders of images, which training, evaluation, comparison and prediction share.

What is passed over is counted (`Skipped`): hidden files, what systems and programs leave behind, files that stand
beside an image (`IMG_1.aae`, `IMG_1.jpg.json`, the film of a live photo), formats that cannot be read.

Links to files are files. A link to a folder is followed, once, unless it leads to a folder that is read anyway: one
inside the walk, or one above it. So a walk always ends, and no image comes twice.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastfsl.data.natural_order import natural_key
from fastfsl.data.skipped import BROKEN_LINK, HIDDEN, NO_READER, NOT_AN_IMAGE, SIDECAR, Skipped, ending
from fastfsl.errors import DataError, resource_error
from fastfsl.images import HEIF_ENDINGS, avif_readable, heif_installed

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".mpo", ".avif",
})

# Images all the same, in formats that are not read: of raw sensors, of programs, of printers and scanners.
_UNREAD_EXTENSIONS = frozenset({
    ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".dng", ".pef", ".raw",
    ".rwl", ".3fr", ".x3f", ".psd", ".psb", ".xcf", ".svg", ".eps", ".ai", ".ico", ".icns", ".tga", ".hdr", ".exr",
    ".jxl", ".jxr", ".pcx", ".dcm", ".qoi",
    *HEIF_ENDINGS,
})

# Folders of file systems, network drives, archives and programs; and beginnings of such names.
_SYSTEM_FOLDERS = frozenset({
    "@eadir", "#recycle", "@recycle", "@recently-snapshot", "@tmp", "#snapshot", "~snapshot", "$recycle.bin",
    "lost+found", "__macosx", "system volume information", "network trash folder",
    "temporary items", "__pycache__", "found.000", "msocache", "lost.dir",
})
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "picasa.ini", "zbthumbnail.info"})
# fmt: on
_SYSTEM_BEGINNINGS = (".", "@__", "synofile_", "synophoto_", "~$")

# What cameras and programs write beside an image, whatever the image is called; and on any image's name.
_SIDECAR_EXTENSIONS = frozenset({".xmp", ".aae", ".thm", ".lrv", ".pp3", ".dop", ".on1", ".cos", ".nksc"})
_COPY_NUMBER = re.compile(r"\(\d+\)$")


def readable_extensions() -> frozenset[str]:
    """Endings of the images that can be read here, in lower case."""
    heif = HEIF_ENDINGS if heif_installed() else ()
    return (IMAGE_EXTENSIONS if avif_readable() else IMAGE_EXTENSIONS - {".avif"}).union(heif)


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden, or something that systems and programs leave behind."""
    folded = name.casefold()
    return folded.startswith(_SYSTEM_BEGINNINGS) or folded in _SYSTEM_FOLDERS or folded in _SYSTEM_FILES


def walk(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """Every image below a folder, in natural order.

    No more than the names in one folder, and in those above it, are held.

    Args:
        folder: where to begin.
        skipped: counts what is passed over, as the walk goes on.

    Raises:
        DataError: a folder cannot be listed.
        ResourceError: the machine cannot list it at the moment.
    """
    yield from _Walk(folder, skipped)


class Entries:
    """What lies in one folder, sorted out.

    Attributes:
        folders: visible folders and links to some.
        files: visible files, by name.
        hidden: the others, by path.
        broken: links that lead nowhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folders: list[Path] = []
        self.files: list[Path] = []
        self.hidden: list[Path] = []
        self.broken: list[Path] = []
        for entry in _entries(folder):
            path = folder / entry.name
            if is_system_name(entry.name):
                self.hidden.append(path)
            elif _is_folder(entry):
                self.folders.append(path)
            elif entry.is_symlink() and not path.exists():
                self.broken.append(path)
            else:
                self.files.append(path)

    def images(self, skipped: Skipped) -> set[Path]:
        """Those of the files that are images; the other files, hidden ones and broken links are counted."""
        readable = readable_extensions()
        images = {path for path in self.files if path.suffix.lower() in readable}
        pictures = images | {path for path in self.files if path.suffix.lower() in _UNREAD_EXTENSIONS}
        beside = _Beside(pictures)
        for path in self.files:
            if path in images:
                continue
            if path in pictures or path.suffix.lower() in IMAGE_EXTENSIONS:
                skipped.add(NO_READER, path, detail=ending(path.name))
            elif path in beside:
                skipped.add(SIDECAR, path, detail=ending(path.name))
            else:
                skipped.add(NOT_AN_IMAGE, path, detail=ending(path.name))
        for path in self.hidden:
            if path.is_dir() and not path.is_symlink():
                skipped.add(HIDDEN, path, _number_below(path))
            else:
                skipped.add(HIDDEN, path)
        for path in self.broken:
            skipped.add(BROKEN_LINK, path, detail=ending(path.name))
        return images


class _Beside:
    """Tells the files that stand beside an image: `1.xmp`, `1.jpg.json`, `1.mov`, `1.jpg(1).json` of `1.jpg`."""

    def __init__(self, images: set[Path]) -> None:
        self._names = {path.name.casefold() for path in images} | {path.stem.casefold() for path in images}

    def __contains__(self, path: Path) -> bool:
        if path.suffix.lower() in _SIDECAR_EXTENSIONS:
            return True
        stem = path.stem.casefold()
        return any(
            name in self._names
            for name in (
                stem,
                _COPY_NUMBER.sub("", stem),
                stem.removesuffix(".supplemental-metadata"),
                stem.removesuffix("_hevc"),
            )
        )


class _Walk:
    def __init__(self, root: Path, skipped: Skipped) -> None:
        self._skipped = skipped
        self._top = _real(root)
        self._root = root
        self._entered = {_identity(root)}

    def __iter__(self) -> Iterator[Path]:
        waiting = [self._sorted(self._root)]  # not by recursion: folders lie deeper than Python's stack
        while waiting:
            name, path = next(waiting[-1], ("", self._root))
            if not name:
                waiting.pop()
            elif not name.endswith("/"):
                yield path
            elif self._enter(path):
                waiting.append(self._sorted(path))

    def _sorted(self, folder: Path) -> Iterator[tuple[str, Path]]:
        entries = Entries(folder)
        images = entries.images(self._skipped)
        # A folder sorts as the beginning of the paths below it.
        names = [(f"{path.name}/", path) for path in entries.folders] + [(path.name, path) for path in images]
        return iter(sorted(names, key=lambda pair: natural_key(pair[0])))

    def _enter(self, folder: Path) -> bool:
        """Whether a folder is to be read, which it is once."""
        if folder.is_symlink():
            target = _real(folder)
            if target.is_relative_to(self._top) or self._top.is_relative_to(target):
                return False
        identity = _identity(folder)
        if identity in self._entered:
            return False
        self._entered.add(identity)
        return True


def _number_below(folder: Path) -> int:
    """Files below a hidden folder, which may be one that nobody may list."""
    return sum(len(files) for _, _, files in os.walk(folder, onerror=None))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise resource_error(error, f"list {folder}") or DataError(
            f"{folder} cannot be listed ({error.strerror or error}): check its permissions"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link that leads to itself, or a disk that fails
        fault = resource_error(error, f"read {entry.path}")
        if fault is not None:
            raise fault from error
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))
