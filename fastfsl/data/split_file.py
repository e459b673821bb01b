"""Split files of the CoOp/Dassl convention: `split_zhou_<Name>.json`.

One JSON object `{"train": [[relative_path, label, class_name], ...], "val": [...], "test": [...]}`. Labels count from 0
without gaps. Paths are relative to the image folder, which the file does not name: it is taken to be the file's own
folder or the first folder beside the file that holds the first listed image (`images/`, `101_ObjectCategories/`, ...).

Source: Zhou et al., "Learning to Prompt for Vision-Language Models" (data layout).
"""

import json
import reprlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from fastfsl.data.dataset import SPLITS, ImageDataset, ImageSample, check_distinct, is_text
from fastfsl.data.natural_order import natural_key
from fastfsl.data.split_names import split_of
from fastfsl.errors import DataError, resource_error
from fastfsl.images import advice_on_missing, with_slashes

_FORM = 'expected {"train": [["relative/path.jpg", 0, "class name"], ...], "val": [...], "test": [...]}'


def read_split_file(path: str | Path, image_root: str | Path | None = None) -> ImageDataset:
    """Read a split file and check that its images exist.

    Args:
        path: The JSON file.
        image_root: Folder that the listed paths are relative to; default: looked for beside the file.

    Returns:
        The data set, samples in the file's order.

    Raises:
        DataError: Not such a file, inconsistent labels, fewer than two classes, a class in val or test that train
            lacks, or missing images.
    """
    path = Path(path)
    listed = _parse(path)
    class_names = _class_names(path, listed)
    root = Path(image_root) if image_root is not None else _find_image_root(path, listed)
    if not root.is_dir():
        raise DataError(f"image folder {root} is not a folder")
    splits = {
        split: tuple(ImageSample(root / relative, label) for relative, label, _ in items)
        for split, items in listed.items()
    }
    missing = [sample.path for samples in splits.values() for sample in samples if not _is_file(sample.path)]
    if missing:
        shown = ", ".join(str(file) for file in missing[:3])
        raise DataError(
            f"{path}: {len(missing)} of {sum(map(len, splits.values()))} listed images are missing, such as {shown}; "
            "give the folder the listed paths are relative to (image root)"
        )
    return ImageDataset(root, class_names, splits, "split-file")


def is_split_file(path: Path) -> bool:
    """Whether it is a JSON object with lists for splits, which may be wrong in other ways."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):  # whoever reads it says why
        return False
    return isinstance(content, dict) and any(split in _by_split(content) for split in SPLITS)


def _by_split(content: dict[str, object]) -> dict[str, object]:
    """What stands under the usual names of splits; where two mean the same, under the one that is the split's own."""
    named = {split_of(name): items for name, items in content.items() if split_of(name) is not None}
    return {split: content.get(split, named.get(split)) for split in SPLITS if split in named}


def _parse(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise resource_error(error, f"read {path}") or DataError(
            f"split file {path} cannot be read: {error.strerror or error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON split file ({error}): {_FORM}") from error
    if not isinstance(content, dict) or not _by_split(content):
        raise DataError(f"{path} is not a split file: {_FORM}")
    content = _by_split(content)
    listed: dict[str, list[tuple[str, int, str]]] = {}
    for split in SPLITS:
        items = content.get(split)
        if items is None:
            continue
        if not isinstance(items, list):
            raise DataError(f'{path}: "{split}" is {type(items).__name__}, not a list: {_FORM}')
        # An empty "val" is customary; an empty "train" or "test" is a mistake that later errors would only hide.
        if not items and split == "train":
            raise DataError(f'{path}: "train" is empty')
        if items:
            listed[split] = [_item(path, split, row, item) for row, item in enumerate(items)]
    if not listed:
        raise DataError(f"{path} lists no image: {_FORM}")
    return listed


def _item(path: Path, split: str, row: int, item: object) -> tuple[str, int, str]:
    where = f"{path}: {split}[{row}]"
    match item:
        case [str(relative), int(label), str(name)] if not isinstance(label, bool):
            pass
        case _:
            raise DataError(f"{where} is {reprlib.repr(item)}, expected [relative path, label, class name]")
    if label < 0:
        raise DataError(f"{where} has label {label}: labels count from 0")
    if not name.strip():
        raise DataError(f"{where} has an empty class name")
    relative = with_slashes(relative)
    if PureWindowsPath(relative).drive:
        raise DataError(
            f"{where} has path {reprlib.repr(relative)}{advice_on_missing(relative)}, below the image folder"
        )
    parts = PurePosixPath(relative).parts
    if not parts or relative.startswith("/") or ".." in parts or "\0" in relative or not is_text(relative + name):
        raise DataError(f"{where} has path {reprlib.repr(relative)}: expected one below the image folder, without '..'")
    return relative, label, name


def _class_names(path: Path, listed: dict[str, list[tuple[str, int, str]]]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for split, items in listed.items():
        for row, (_, label, name) in enumerate(items):
            if names.setdefault(label, name) != name:
                raise DataError(
                    f"{path}: {split}[{row}] calls label {label} {name!r}, elsewhere it is {names[label]!r}: "
                    "one name per label"
                )
    gaps = next((label for label in range(len(names)) if label not in names), None)
    if gaps is not None:
        raise DataError(
            f"{path}: labels must be 0..{len(names) - 1} without gaps for {len(names)} classes; "
            f"label {gaps} is never used, the largest is {max(names)}"
        )
    if len(names) < 2:
        raise DataError(f"{path} has one class only ({names[0]!r}): at least two are needed to tell apart")
    learnt = {label for _, label, _ in listed.get("train", ())}
    if learnt and (unlearnt := sorted(set(names) - learnt)):
        shown = ", ".join(f"{label} ({names[label]!r})" for label in unlearnt[:5])
        raise DataError(f'{path}: {len(unlearnt)} classes have no image in "train", such as {shown}')
    class_names = tuple(names[label] for label in range(len(names)))
    check_distinct(path, class_names)
    return class_names


def _find_image_root(path: Path, listed: dict[str, list[tuple[str, int, str]]]) -> Path:
    first = next(iter(listed.values()))[0][0]
    beside = sorted(
        (entry for entry in path.parent.iterdir() if entry.is_dir()), key=lambda entry: natural_key(entry.name)
    )
    for root in (path.parent, *beside):
        if _is_file(root / first):
            return root
    raise DataError(
        f"{path}: the first listed image, {first!r}, is neither below {path.parent} nor below a folder in it; "
        "give the folder the listed paths are relative to (image root)"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # such as a name too long for the file system, or a disk that fails
        fault = resource_error(error, f"read {path}")
        if fault is not None:
            raise fault from error
        return False
