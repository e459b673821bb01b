"""Tables of image paths and labels: CSV, TSV, JSON lines, Parquet, a Hugging Face metadata file, COCO categories.

One row per image: its path, relative to the table's folder, to a folder beside the table or to an image root, or
absolute; its label, a class name or a number; and if there is a column for it, its split. Without one everything is
"train", as in a folder without splits; `train.csv`, `val.csv` and `test.csv` in one folder are one data set.
"""

import math
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from fastfsl.data.coco import is_coco, read_coco
from fastfsl.data.dataset import SPLITS, ImageDataset, ImageSample, is_text
from fastfsl.data.natural_order import natural_key
from fastfsl.data.skipped import LISTED_TWICE, NO_LABEL, Skipped, some
from fastfsl.data.split_names import split_of
from fastfsl.data.table_columns import Columns, choose_columns, has_labels
from fastfsl.data.table_file import TABLE_ENDINGS, Table, read_table_file
from fastfsl.data.table_images import ImageFinder
from fastfsl.data.walk import Entries
from fastfsl.errors import ConfigError, DataError
from fastfsl.images import advice_on_missing, is_address

_MAX_SHOWN = 10


# Of tables that are found in a folder; any other file may be given by name.
_FOUND_ENDINGS = tuple(ending for ending in (*TABLE_ENDINGS, ".json") if ending != ".txt")
_NAMES = (
    "labels",
    "label",
    "annotations",
    "annotation",
    "classes",
    "index",
    "dataset",
    "data",
    "images",
    "_annotations.coco",
)


@dataclass(frozen=True)
class Tables:
    """A table in a folder, or one per split.

    Attributes:
        files: a file, or files by split.
        sure: their names say that they describe the folder.
    """

    files: Path | dict[str, Path]
    sure: bool

    @property
    def names(self) -> str:
        """The files' names."""
        files = [self.files] if isinstance(self.files, Path) else self.files.values()
        return ", ".join(path.name for path in files)


@dataclass(frozen=True)
class _Row:
    path: str
    label: str
    split: str
    line: int
    table: Path


def read_table(
    tables: Path | Mapping[str, Path], image_root: Path | None = None, columns: Columns | None = None
) -> ImageDataset:
    """Read a table of images and their labels, or one table per split.

    Args:
        tables: a file; or files by split.
        image_root: folder that paths are relative to; default: the table's, or a folder beside it.
        columns: names of its columns; default: guessed.

    Raises:
        DataError: the table cannot be read, its columns are not clear, files are missing (all are counted), a class of
            val or test is not in train, or there are fewer than two classes.
        ConfigError: a column that was named is not there, or the file takes a package that is not installed.
    """
    files = {"train": tables} if isinstance(tables, Path) else dict(tables)
    first = next(iter(files.values()))
    if image_root is not None and not image_root.is_dir():
        raise DataError(f"image folder {image_root} is not a folder")
    skipped = Skipped()
    notes: list[str] = []
    rows = {}
    for split, path in files.items():
        table = read_coco(path) if is_coco(path) else read_table_file(path)
        rows[path] = _rows(table, columns or Columns(), split, skipped, notes)
    every = [row for of_table in rows.values() for row in of_table]
    if not every:
        raise DataError(f"{first}: no row has a label")
    class_names, label_of = _classes(first, every)
    finders = {path: ImageFinder(path.parent, image_root, [row.path for row in rows[path]]) for path in rows}
    seen: set[tuple[Path, str, str]] = set()
    missing: list[str] = []
    samples: dict[str, list[ImageSample]] = {}
    for row in every:
        found = finders[row.table].find(row.path)
        if found is None:
            missing.append(row.path)
        elif (found, row.label, row.split) in seen:
            skipped.add(LISTED_TWICE, found)
        else:
            seen.add((found, row.label, row.split))
            samples.setdefault(row.split, []).append(ImageSample(found, label_of[row.label]))
    if missing:
        raise DataError(_missing(first, missing, len(every), finders[first].looked_in))
    splits = {split: tuple(samples[split]) for split in SPLITS if split in samples}
    roots = {finder.root for finder in finders.values()}
    root = roots.pop() if len(roots) == 1 else Path(os.path.commonpath(sorted(map(str, roots))) or ".")
    return ImageDataset(root, class_names, splits, "table", skipped, tuple(notes))


def find_tables(folder: Path, columns: Columns | None = None) -> Tables | None:
    """What describes the images of a folder, if anything does: files that list images with labels.

    A Hugging Face metadata file, there or in each split's folder; one called labels, annotations or the like; one per
    split, as train.csv and test.csv; or the only table there is.
    """
    entries = Entries(folder)
    files = [path for path in entries.files if path.suffix.lower() in _FOUND_ENDINGS]
    by_stem = {path.stem.casefold(): path for path in files}
    if "metadata" in by_stem and _lists_images(by_stem["metadata"], columns):
        return Tables(by_stem["metadata"], sure=True)
    in_splits = {}
    for path in entries.folders:
        split = split_of(path.name)
        metadata = [file for file in Entries(path).files if file.stem.casefold() == "metadata"] if split else []
        if split and metadata and metadata[0].suffix.lower() in _FOUND_ENDINGS and _lists_images(metadata[0], columns):
            in_splits[split] = metadata[0]
    if in_splits:
        return Tables(in_splits, sure=True)
    listing = [path for path in files if _lists_images(path, columns)]
    of_splits = {split_of(path.stem): path for path in listing}
    by_split = {split: of_splits[split] for split in SPLITS if split in of_splits}
    if "train" in by_split:
        return Tables(by_split, sure=True)
    named = [path for path in listing if path.stem.casefold() in _NAMES]
    if named:
        return Tables(named[0], sure=True)
    return Tables(listing[0], sure=False) if len(listing) == 1 else None


def _lists_images(path: Path, columns: Columns | None) -> bool:
    try:
        return has_labels(read_coco(path) if is_coco(path) else read_table_file(path), columns or Columns())
    except (DataError, ConfigError):  # not for us; what is needed and cannot be read is said where it is read
        return False


def _rows(table: Table, given: Columns, split: str, skipped: Skipped, notes: list[str]) -> list[_Row]:
    chosen = choose_columns(table, given)
    labels = table.columns[chosen.names or chosen.label]
    splits = None if chosen.split is None else table.columns[chosen.split]
    paths = [_text(value) for value in table.columns[chosen.path]]
    unknown = sorted({str(value) for value in splits or () if split_of(_text(value)) is None}, key=natural_key)
    if unknown:
        raise DataError(
            f"{table.path}: the column {chosen.split!r} has {some(unknown)}: expected train, val or test, by any usual "
            "name"
        )
    addresses = [path for path in paths if is_address(path)]
    if addresses:
        raise DataError(
            f"{table.path}: {len(addresses)} of {len(paths)} paths are addresses, such as {addresses[0]}; nothing is "
            "fetched from the network: download them first"
        )
    if chosen.names is None and all(re.fullmatch(r"-?\d+(\.\d+)?|", _label(table, value, 0)) for value in labels):
        notes.append(
            f"{table.path}: the classes are called by numbers, of which a text encoder knows nothing: add a column "
            "label_name with their names"
        )
    rows = []
    for number, path in enumerate(paths):
        line = table.lines[number]
        label = _label(table, labels[number], line)
        if not path:
            raise DataError(f"{table.path}, row {line}: the column {chosen.path!r} is empty")
        if not label:
            skipped.add(NO_LABEL, path)
            continue
        row_split = split if splits is None else split_of(_text(splits[number]))
        rows.append(_Row(path, label, str(row_split), line, table.path))
    return rows


def _text(value: Any) -> str:  # noqa: ANN401 - whatever a table holds
    return "" if value is None else str(value).strip()


def _label(table: Table, value: Any, line: int) -> str:  # noqa: ANN401 - whatever a table holds
    """A label as a class name; "" where there is none."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | tuple | dict):
        raise DataError(f"{table.path}, row {line}: expected one label, got {str(value)[:60]}")
    if isinstance(value, float):
        if math.isnan(value):  # as frames write what is missing
            return ""
        value = int(value) if value.is_integer() else value
    name = unicodedata.normalize("NFC", _text(value))
    if not is_text(name):
        raise DataError(f"{table.path}, row {line}: the label {name!r} is no text")
    return name


def _classes(where: Path, rows: list[_Row]) -> tuple[tuple[str, ...], dict[str, int]]:
    learnt = {row.label for row in rows if row.split == "train"}
    names = learnt or {row.label for row in rows}
    for row in rows:
        if row.label not in names:
            others = sorted({row.label for row in rows} - names, key=natural_key)
            raise DataError(
                f"{where}: {some(others)} in {row.split} but not in train; every class needs images to learn from"
            )
    if len(names) < 2:
        raise DataError(f"{where} has one class only ({some(names)}): at least two are needed to tell apart")
    ordered = tuple(sorted(names, key=natural_key))
    return ordered, {name: label for label, name in enumerate(ordered)}


def _missing(where: Path, missing: list[str], total: int, looked_in: list[Path]) -> str:
    shown = ", ".join(missing[:_MAX_SHOWN]) + (
        f" and {len(missing) - _MAX_SHOWN} more" if len(missing) > _MAX_SHOWN else ""
    )
    advice = advice_on_missing(missing[0]) if PureWindowsPath(missing[0]).drive else ""
    places = ", ".join(map(str, looked_in[:5]))
    return (
        f"{where}: {len(missing)} of {total} listed images are missing: {shown}{advice}; looked in {places}: give the "
        "folder the paths are relative to with --images"
    )
