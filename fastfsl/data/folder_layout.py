"""Which folders are splits and which are classes, and which folder was meant where the one given is neither."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastfsl.data.natural_order import natural_key
from fastfsl.data.skipped import BESIDE, NO_CLASS, NOT_AN_IMAGE, SIDECAR, Skipped, ending, some
from fastfsl.data.split_names import assign_splits, is_wrapper, split_of
from fastfsl.data.walk import IMAGE_EXTENSIONS, Entries, is_system_name, readable_extensions
from fastfsl.errors import DataError
from fastfsl.images import HEIF_ENDINGS

EXPECTED = "expected one folder per class, or train/ (and val/, test/) each holding one folder per class"

# How far below or above the folder that was given the one that was meant is looked for, and among how many.
_MAX_DEPTH = 3
_MAX_FOLDERS = 2000

Classes = dict[str, Path]


def find_layout(root: Path, skipped: Skipped) -> dict[str, Classes]:
    """The class folders of each split; those of a folder without splits are "train".

    Args:
        root: the folder of a data set.
        skipped: counts the files that lie outside the class folders.

    Raises:
        DataError: it is laid out in no way that is known; the folder that was probably meant is named.
    """
    entries = Entries(root)
    folders = {path.name: path for path in entries.folders}
    if not any(map(holds_image, folders.values())):
        raise DataError(_nothing_below(root, entries))
    assigned, others = assign_splits(list(folders))
    splits = {split: [folders[name] for name in names] for split, names in assigned.items()}
    if any(_subfolders(path) for paths in splits.values() for path in paths):
        by_split = _split_layout(root, splits, [folders[name] for name in others], skipped)
    else:
        full = [path for path in folders.values() if holds_image(path)]
        if all(split_of(path.name) for path in full):
            raise DataError(
                f"{root}: {some(path.name for path in full)} would be the classes, and these are names of splits; "
                f"put class folders into them, such as {full[0] / 'CLASS'}: {EXPECTED}"
            )
        if len(full) == 1 and is_wrapper(full[0].name) and len(_full_subfolders(full[0])) > 1:
            for path in folders.values():
                if path is not full[0]:
                    _count_beside(path, skipped)
            by_split = find_layout(full[0], skipped)
        else:
            _check_not_too_high(root, full)
            by_split = _splits_in_classes(root, full) or {"train": _by_name(root, folders.values())}
    _count_files(entries, skipped)
    return by_split


def holds_image(folder: Path) -> bool:
    """Whether there is an image below, at once; a picture in HEIC counts even if it cannot be read here."""
    endings = readable_extensions() | IMAGE_EXTENSIONS | frozenset(HEIF_ENDINGS)
    waiting, entered = [folder], set()
    while waiting:
        current = waiting.pop()
        try:
            # Not the resolved path: resolving a path through many links costs a call for each of them.
            status = current.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in entered:
                continue
            entered.add(identity)
            with os.scandir(current) as found:
                for entry in found:
                    if is_system_name(entry.name):
                        continue
                    if Path(entry.name).suffix.lower() in endings:
                        return True
                    if entry.is_dir():
                        waiting.append(current / entry.name)
        except OSError:  # whoever reads the folder says why
            continue
    return False


def _split_layout(
    root: Path, splits: dict[str, list[Path]], others: list[Path], skipped: Skipped
) -> dict[str, Classes]:
    foreign = [path.name for path in others if holds_image(path)]
    if foreign:
        raise DataError(
            f"{root} has split folders and, beside them, {some(foreign)}: {EXPECTED}; move what does not belong there"
        )
    for path in others:
        _count_beside(path, skipped)
    by_split = {}
    for split, paths in splits.items():
        if len(paths) > 1:
            raise DataError(f"{root}: {some(path.name for path in paths)} all mean the {split} split; keep one of them")
        by_split[split] = _classes_of_split(paths[0], skipped)
    return by_split


def _classes_of_split(folder: Path, skipped: Skipped) -> Classes:
    """The class folders of a split, which may lie in `images/` below it."""
    entries = Entries(folder)
    full = [path for path in entries.folders if holds_image(path)]
    inside = full[0] if len(full) == 1 and is_wrapper(full[0].name) else None
    if inside is not None and _full_subfolders(inside):
        for path in entries.folders:
            if path is not inside:
                _count_beside(path, skipped)
        _count_files(entries, skipped)
        return _classes_of_split(inside, skipped)
    if not entries.folders:
        images = entries.images(Skipped())
        what = f"holds {len(images)} images and no class folder" if images else "holds no class folder"
        raise DataError(f"{folder} {what}: {EXPECTED}")
    _count_files(entries, skipped)
    return _by_name(folder, entries.folders)


def _splits_in_classes(root: Path, full: list[Path]) -> dict[str, Classes] | None:
    """The layout `CLASS/train/...`, `CLASS/test/...`, if it is that one.

    Raises:
        DataError: some classes are laid out so and others not, or what looks like classes are data sets.
    """
    within = {path: _full_subfolders(path) for path in full}
    several = [path for path, folders in within.items() if len({split_of(name) for name in folders} - {None}) > 1]
    sets = [
        path
        for path, folders in within.items()
        if folders
        and all(map(split_of, folders))
        and any(len(_full_subfolders(folder)) > 1 for folder in folders.values())
    ]
    if sets:
        raise DataError(
            f"{root} holds {'data sets' if len(sets) > 1 else 'a data set'}, not classes: give "
            f"{' or '.join(str(path) for path in sets[:5])}"
        )
    if not several:
        return None
    by_split: dict[str, Classes] = {}
    for path, folders in within.items():
        names, others = assign_splits(list(folders))
        if others or _holds_image_itself(path) or any(len(members) > 1 for members in names.values()):
            raise DataError(
                f"{root}: {several[0].name!r} has {some(within[several[0]])} in it, as a class with splits of its own, "
                f"and {path.name!r} has not; {EXPECTED}"
            )
        for split, members in names.items():
            by_split.setdefault(split, {})[_class_name(path)] = folders[members[0]]
    if "train" not in by_split:
        return None
    return {split: by_split[split] for split in ("train", "val", "test") if split in by_split}


def _check_not_too_high(root: Path, full: list[Path]) -> None:
    """Refuse the folder above a data set, where its only folder would be the only class."""
    if len(full) > 1:
        return
    only = full[0]
    if is_dataset(only):
        raise DataError(f"{root} holds one folder, and that is a data set: give {only}")
    below = next((path for path in _folders_below(only) if is_dataset(path)), None)
    if below is not None:
        raise DataError(f"{root} holds one folder, {only.name!r}, and a data set further down: give {below}")


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds split folders with class folders in them, or at least two class folders."""
    folders = _full_subfolders(folder)
    split = [path for name, path in folders.items() if split_of(name) and _full_subfolders(path)]
    return bool(split) or (len(folders) > 1 and not _holds_image_itself(folder))


def _nothing_below(root: Path, entries: Entries) -> str:
    """What to say of a folder without class folders that hold images."""
    counted = Skipped()
    images = entries.images(counted)
    if not images and not entries.folders:
        lost = f"; it has {counted.words(counted.unexpected)}" if counted.unexpected else ""
        return f"{root} holds no folder: {EXPECTED}{lost}"
    if not images:
        return f"{root} holds no image in its folders {some(path.name for path in entries.folders)}: {EXPECTED}"
    whole = root.resolve()
    above = whole.parent
    if split_of(above.name) and is_dataset(above.parent):
        above = above.parent
    meant = f"; it looks like one class of {above}: give that folder" if is_dataset(above) else ""
    return f"{root} holds no folder of a class but {len(images)} images: {EXPECTED}{meant}"


def _folders_below(folder: Path) -> Iterator[Path]:
    """Folders below, the nearest first, some levels deep."""
    level = [folder]
    looked_at = 0
    for _ in range(_MAX_DEPTH):
        level = [path for parent in level for path in _subfolders(parent).values()]
        for path in level:
            looked_at += 1
            if looked_at > _MAX_FOLDERS:
                return
            yield path


def _by_name(where: Path, folders: Iterable[Path]) -> Classes:
    classes: Classes = {}
    for path in folders:
        name = _class_name(path)
        if name in classes:
            raise DataError(f"{where}: two folders are both called {name!r}, written in other bytes: rename one")
        classes[name] = path
    return dict(sorted(classes.items(), key=lambda pair: natural_key(pair[0])))


def _class_name(folder: Path) -> str:
    """The folder's name, composed: systems write é as one character or as two, and it is the same class."""
    return unicodedata.normalize("NFC", folder.name)


def _subfolders(folder: Path) -> Classes:
    return {path.name: path for path in Entries(folder).folders}


def _full_subfolders(folder: Path) -> Classes:
    return {name: path for name, path in _subfolders(folder).items() if holds_image(path)}


def _holds_image_itself(folder: Path) -> bool:
    return bool(Entries(folder).images(Skipped()))


def _count_files(entries: Entries, skipped: Skipped) -> None:
    """Count the files of a folder whose folders are the classes."""
    counted = Skipped()
    for path in entries.images(counted):
        skipped.add(NO_CLASS, path, detail=ending(path.name))
    for reason, number in counted.counts.items():
        beside = reason.startswith((NOT_AN_IMAGE, SIDECAR))
        skipped.add(BESIDE if beside else reason, counted.examples[reason], number)


def _count_beside(folder: Path, skipped: Skipped) -> None:
    """Count the files of a folder without images."""
    number = sum(len(files) for _, _, files in os.walk(folder))
    skipped.add(BESIDE, folder, number)
