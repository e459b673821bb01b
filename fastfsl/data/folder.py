"""Image folders: one folder per class, with or without train/val/test folders above them.

Accepted layouts:

- `ROOT/<class>/<image>`: everything is the "train" split.
- `ROOT/train/<class>/<image>`, and optionally `ROOT/val/...` and `ROOT/test/...`, by any usual name (`Training`,
  `valid`, `TEST`; see `fastfsl.data.split_names`).
- `ROOT/<class>/train/<image>` and `ROOT/<class>/test/<image>`.
- any of these in `ROOT/images/`; class folders in `ROOT/train/images/`.

Images may lie deeper below their class folder. Endings match in any case. Classes and files are in natural order ("2"
before "10"). `fastfsl.data.walk` says which links are followed and what is passed over, all of which is counted.
"""

from collections.abc import Iterable
from pathlib import Path

from fastfsl.data.dataset import ImageDataset, ImageSample, is_text
from fastfsl.data.folder_layout import EXPECTED, Classes, find_layout
from fastfsl.data.natural_order import natural_key
from fastfsl.data.skipped import Skipped, some
from fastfsl.data.walk import walk
from fastfsl.errors import DataError
from fastfsl.images import advice_on_missing


def read_folder(root: str | Path) -> ImageDataset:
    """Read an image folder.

    Args:
        root: The folder.

    Returns:
        The data set. Class names are the folder names of "train" (of all splits where there is no "train").

    Raises:
        DataError: Missing or empty folder, fewer than two classes, classes called as splits, a class without an image
            file, or a class in val or test that train lacks.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder{advice_on_missing(str(root))}: {EXPECTED}")
    skipped = Skipped()
    by_split = find_layout(root, skipped)
    class_names = _class_names(root, by_split)
    label_of = {name: label for label, name in enumerate(class_names)}
    splits: dict[str, tuple[ImageSample, ...]] = {}
    for split, class_folders in by_split.items():
        samples: list[ImageSample] = []
        empty: list[str] = []
        passed_over = Skipped()
        for name, folder in class_folders.items():
            in_class = Skipped()
            images = _in_order(walk(folder, in_class), folder)
            samples += [ImageSample(path, label_of[name]) for path in images]
            skipped.update(in_class)
            if not images:
                empty.append(name)
                passed_over.update(in_class)
        # A class may be missing from val and test, so an empty folder there says nothing; in train it is a mistake.
        if empty and (split == "train" or not samples):
            lost = f" (there are {passed_over.words(passed_over.unexpected)})" if passed_over.unexpected else ""
            raise DataError(
                f"{root}: no image file in the {split} folder of {some(empty)}{lost}; "
                "put images (.jpg, .png, .webp, ...) there or remove the folder"
            )
        splits[split] = tuple(samples)
    return ImageDataset(root, class_names, splits, "folder", skipped)


def _in_order(images: Iterable[Path], folder: Path) -> list[Path]:
    """Images in the natural order of their whole paths below a folder, by which episodes are drawn."""
    return sorted(images, key=lambda file: natural_key(file.relative_to(folder).as_posix()))


def _class_names(root: Path, by_split: dict[str, Classes]) -> tuple[str, ...]:
    reference = by_split.get("train") or {name: path for folders in by_split.values() for name, path in folders.items()}
    for split, class_folders in by_split.items():
        unknown = sorted(set(class_folders) - set(reference), key=natural_key)
        if unknown:
            raise DataError(
                f"{root}: {some(unknown)} in {split}/ but not in train/; every class needs images to learn from, "
                "and class folders must be spelt alike in every split"
            )
    for name in reference:
        if not is_text(name):
            raise DataError(f"{root}: the folder name {name!r} is not UTF-8, so no class can be called so: rename it")
    if len(reference) < 2:
        raise DataError(f"{root} holds one class only ({some(reference)}): at least two are needed to tell apart")
    return tuple(sorted(reference, key=natural_key))
