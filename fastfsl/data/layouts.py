"""Folders of the standard sets, as their publishers and the CoOp convention lay them out.

| what lies in the folder                                                | read as                                |
|------------------------------------------------------------------------|----------------------------------------|
| a set's split file, `split_zhou_<Name>.json`                           | that split file                        |
| `variants.txt`, `images_variant_{train,val,test}.txt`, `images/`       | FGVC-Aircraft by variant               |
| `classnames.txt`, `images/train/<wnid>/`, `images/val/<wnid>/`         | ImageNet, its validation split as test |

ImageNet's `classnames.txt` is the CoOp repository's: `n01440764 tench`, a line a class. Two of its names stand for two
classes each; the second of them gets its WordNet id behind the name, which the preset's prompts leave out again.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fastfsl.data.dataset import SPLITS, ImageDataset, ImageSample, check_distinct
from fastfsl.data.folder import read_folder
from fastfsl.data.presets import PRESETS
from fastfsl.data.split_file import read_split_file
from fastfsl.errors import DataError, resource_error

_VARIANTS = "variants.txt"
_CLASS_NAMES = "classnames.txt"


def read_standard_set(root: Path) -> ImageDataset | None:
    """Read the folder of a standard set; None if it is laid out as none of them.

    Raises:
        DataError: A list in it cannot be read, or names what is not there.
    """
    try:
        found = {entry.name for entry in root.iterdir()}
    except OSError as error:  # whoever reads it as a plain folder says why
        fault = resource_error(error, f"list {root}")
        if fault is not None:
            raise fault from error
        return None
    for preset in PRESETS.values():
        if preset.split_file in found:
            return read_split_file(root / preset.split_file)
    if {_VARIANTS, "images_variant_train.txt"} <= found:
        return _read_aircraft(root)
    if {_CLASS_NAMES, "images"} <= found:
        return _read_imagenet(root)
    return None


def _read_aircraft(root: Path) -> ImageDataset:
    class_names = tuple(line for _, line in _lines(root / _VARIANTS))
    check_distinct(root / _VARIANTS, class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    splits: dict[str, tuple[ImageSample, ...]] = {}
    for split in SPLITS:
        path = root / f"images_variant_{split}.txt"
        if not path.is_file():
            continue
        samples = []
        for number, line in _lines(path):
            image, _, name = line.partition(" ")
            if name not in label_of:
                raise DataError(
                    f"{path}, line {number}: {name!r} is not in {_VARIANTS}: expected `image-number variant`"
                )
            samples.append(ImageSample(root / "images" / f"{image}.jpg", label_of[name]))
        missing = [sample.path for sample in samples if not sample.path.is_file()]
        if missing:
            raise DataError(f"{path}: {len(missing)} of {len(samples)} images are missing, such as {missing[0]}")
        splits[split] = tuple(samples)
    return ImageDataset(root, class_names, splits, "split-file")


def _read_imagenet(root: Path) -> ImageDataset:
    names: dict[str, str] = {}
    for number, line in _lines(root / _CLASS_NAMES):
        identifier, _, name = line.partition(" ")
        if not name.strip():
            raise DataError(f"{root / _CLASS_NAMES}, line {number}: expected `n01440764 tench`, got {line!r}")
        names[identifier] = f"{name} ({identifier})" if name in names.values() else name
    dataset = read_folder(root / "images")
    unnamed = [identifier for identifier in dataset.class_names if identifier not in names]
    if unnamed:
        raise DataError(f"{root / _CLASS_NAMES} has no name for {len(unnamed)} class folders, such as {unnamed[0]!r}")
    class_names = tuple(names[identifier] for identifier in dataset.class_names)
    check_distinct(root / _CLASS_NAMES, class_names)
    splits = dict(dataset.splits)
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    return replace(dataset, class_names=class_names, splits=splits)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that hold something, with their numbers from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise resource_error(error, f"read {path}") or DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()
