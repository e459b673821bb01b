"""Image folders: one folder per class, with or without train/val/test folders above them.

Accepted layouts:

- `ROOT/<class>/<image>`: everything is the "train" split.
- `ROOT/train/<class>/<image>`, and optionally `ROOT/val/...` and `ROOT/test/...`.

Images may lie deeper below their class folder. Extensions match in any case; other files and hidden entries are passed
over, and the former counted. Classes and files are in natural order ("2" before "10"). Symbolic links are followed, but
each folder is entered once per class, so a loop ends; a link that leads nowhere is passed over.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastfsl.data.dataset import SPLITS, ImageDataset, ImageSample, is_text
from fastfsl.data.natural_order import natural_key
from fastfsl.errors import DataError, resource_error

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif",
})
# fmt: on

_LAYOUT = "expected one folder per class, or train/ (and val/, test/) each holding one folder per class"


def read_folder(root: str | Path) -> ImageDataset:
    """Read an image folder.

    Args:
        root: The folder.

    Returns:
        The data set. Class names are the folder names of "train" (of all splits where there is no "train").

    Raises:
        DataError: Missing or empty folder, fewer than two classes, a class without an image file, or a class in val or
            test that train lacks.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: {_LAYOUT}")
    folders = _subfolders(root)
    if not folders:
        raise DataError(f"{root} holds no folder: {_LAYOUT}")
    if _has_split_folders(folders):
        by_split = _split_folders(root, folders)
    else:
        by_split = {"train": folders}

    class_names = _class_names(root, by_split)
    label_of = {name: label for label, name in enumerate(class_names)}
    splits: dict[str, tuple[ImageSample, ...]] = {}
    num_ignored = 0
    for split, class_folders in by_split.items():
        samples: list[ImageSample] = []
        empty: list[str] = []
        for name in sorted(class_folders, key=natural_key):
            images, ignored = _images_below(class_folders[name])
            num_ignored += ignored
            samples += [ImageSample(path, label_of[name]) for path in images]
            if not images:
                empty.append(name)
        # A class may be missing from val and test, so an empty folder there says nothing; in train it is a mistake.
        if empty and (split == "train" or not samples):
            raise DataError(
                f"{root}: no image file in the {split} folder of {_listed(empty)}; "
                "put images (.jpg, .png, .webp, ...) there or remove the folder"
            )
        splits[split] = tuple(samples)
    return ImageDataset(root, class_names, splits, "folder", num_ignored)


def _has_split_folders(folders: dict[str, Path]) -> bool:
    """Whether train/val/test here are splits: a *class* called "train" holds images, not folders."""
    return any(name in folders and _subfolders(folders[name]) for name in SPLITS)


def _split_folders(root: Path, folders: dict[str, Path]) -> dict[str, dict[str, Path]]:
    others = [name for name in folders if name not in SPLITS]
    if others:
        raise DataError(
            f"{root} has split folders and, beside them, {_listed(others)}: {_LAYOUT}; move what does not belong there"
        )
    by_split = {split: _subfolders(folders[split]) for split in SPLITS if split in folders}
    for split, class_folders in by_split.items():
        if not class_folders:
            raise DataError(f"{folders[split]} holds no class folder: {_LAYOUT}")
    return by_split


def _class_names(root: Path, by_split: dict[str, dict[str, Path]]) -> tuple[str, ...]:
    reference = by_split.get("train") or {name: path for folders in by_split.values() for name, path in folders.items()}
    for split, class_folders in by_split.items():
        unknown = sorted(set(class_folders) - set(reference), key=natural_key)
        if unknown:
            raise DataError(
                f"{root}: {_listed(unknown)} in {split}/ but not in train/; every class needs images to learn from, "
                "and class folders must be spelt alike in every split"
            )
    for name in reference:
        if not is_text(name):
            raise DataError(f"{root}: the folder name {name!r} is not UTF-8, so no class can be called so: rename it")
    if len(reference) < 2:
        raise DataError(f"{root} holds one class only ({_listed(reference)}): at least two are needed to tell apart")
    return tuple(sorted(reference, key=natural_key))


def _subfolders(folder: Path) -> dict[str, Path]:
    return {entry.name: Path(entry.path) for entry in _visible_entries(folder) if _is_folder(entry)}


def _images_below(folder: Path) -> tuple[list[Path], int]:
    images: list[Path] = []
    ignored = 0
    for file in _files_below(folder):
        if file.suffix.lower() in IMAGE_EXTENSIONS:
            images.append(file)
        else:
            ignored += 1
    images.sort(key=lambda file: natural_key(file.relative_to(folder).as_posix()))
    return images, ignored


def _files_below(folder: Path) -> Iterator[Path]:
    """Every visible file below `folder`; each folder is entered once, however many links lead there."""
    entered: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        for entry in _visible_entries(current):
            if _is_folder(entry):
                waiting.append(Path(entry.path))
            elif not _is_broken_link(entry):
                yield Path(entry.path)


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if _visible(entry.name)), key=lambda entry: natural_key(entry.name)
            )
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


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not Path(entry.path).exists()


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _listed(names: Iterable[str], at_most: int = 5) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
