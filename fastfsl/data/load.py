"""One entrance for every kind of data."""

import os
from dataclasses import replace
from pathlib import Path

from fastfsl.data.coco import is_coco
from fastfsl.data.dataset import FeatureDataset, ImageDataset
from fastfsl.data.duplicates import one_path_two_labels
from fastfsl.data.feature_file import read_feature_file
from fastfsl.data.folder import read_folder
from fastfsl.data.layouts import read_standard_set
from fastfsl.data.skipped import BESIDE, NOT_AN_IMAGE, NOT_LISTED, Skipped
from fastfsl.data.split_file import is_split_file, read_split_file
from fastfsl.data.table import Tables, find_tables, read_table
from fastfsl.data.table_columns import Columns
from fastfsl.data.table_file import TABLE_ENDINGS, is_list_of_objects
from fastfsl.data.walk import walk
from fastfsl.errors import ConfigError, DataError, resource_error
from fastfsl.images import advice_on_missing

_KINDS = (
    "an image folder, a CoOp/Dassl split file (.json), a table of paths and labels (.csv, .tsv, .jsonl, .parquet) or a "
    "feature file (.npz or .safetensors)"
)


def load_dataset(
    path: str | Path, image_root: str | Path | None = None, columns: Columns | None = None
) -> ImageDataset | FeatureDataset:
    """Read an image folder, a standard set's folder, a split file, a table of paths and labels or a feature file.

    Args:
        path: Folder or file.
        image_root: For a split file or a table: the folder its paths are relative to.
        columns: For a table: names of its columns; default: guessed.

    Returns:
        Images or features, as the path says.

    Raises:
        DataError: The path does not exist, is of no known kind, or its content cannot be used.
        ShapeError: A feature file's arrays do not fit each other.
        ConfigError: `image_root` or `columns` given where there is no list that they could be about.
    """
    dataset = _load(Path(path), None if image_root is None else Path(image_root), columns or Columns())
    if isinstance(dataset, FeatureDataset):
        return dataset
    return replace(dataset, notes=(*dataset.notes, *one_path_two_labels(dataset)))


def _load(path: Path, image_root: Path | None, columns: Columns) -> ImageDataset | FeatureDataset:
    suffix = path.suffix.lower()
    if not _exists(path):
        raise DataError(f"{path} does not exist{advice_on_missing(str(path))}: expected {_KINDS}")
    if path.is_dir():
        return _load_folder(path, image_root, columns)
    if suffix in TABLE_ENDINGS or is_coco(path) or (suffix == ".json" and not is_split_file(path) and columns):
        return read_table(path, image_root, columns)
    if columns:
        raise ConfigError(f"names of columns go with a table of paths and labels, and {path} is none")
    if suffix == ".json" and is_list_of_objects(path):
        return read_table(path, image_root, columns)
    if suffix == ".json":
        return read_split_file(path, image_root)
    if image_root is not None:
        raise ConfigError(f"an image root goes with a split file (.json) or a table (.csv, ...), and {path} is neither")
    if suffix in {".npz", ".safetensors"}:
        return read_feature_file(path)
    raise DataError(f"{path} is of no known kind: expected {_KINDS}")


def _load_folder(path: Path, image_root: Path | None, columns: Columns) -> ImageDataset:
    """A standard set, class folders, or images that a table in the folder describes."""
    if image_root is None and not columns:
        standard = read_standard_set(path)
        if standard is not None:
            return standard
    tables = find_tables(path, columns)
    if tables is None:
        if columns or image_root is not None:
            what = "names of columns" if columns else "an image root"
            raise ConfigError(
                f"{what} go with a table or a split file, and none is in the folder {path}: name the file"
            )
        return read_folder(path)
    if columns or image_root is not None:
        return _with_unlisted(read_table(tables.files, image_root, columns), path)
    return _folders_or_table(path, tables)


def _folders_or_table(path: Path, tables: Tables) -> ImageDataset:
    """What class folders say, unless they say nothing or a table says otherwise."""
    try:
        by_folder = read_folder(path)
    except DataError:
        return _with_unlisted(read_table(tables.files), path)
    if not tables.sure:
        return by_folder
    try:
        by_table = read_table(tables.files)
    except DataError as error:
        return replace(by_folder, notes=(f"the classes are the folders, and {tables.names} is not used: {error}",))
    if by_table.class_names == by_folder.class_names and set(by_table.splits) <= set(by_folder.splits):
        return by_folder
    note = f"the classes are those of {tables.names}, not the folders; move the table away if the folders are meant"
    return _with_unlisted(replace(by_table, notes=(*by_table.notes, note)), path)


def _with_unlisted(dataset: ImageDataset, folder: Path) -> ImageDataset:
    """The data set with the files counted that are in the folder and not in its table."""
    listed = {os.path.normpath(sample.path) for samples in dataset.splits.values() for sample in samples}
    beside, skipped = Skipped(), dataset.skipped.copy()
    for file in walk(folder, beside):
        if os.path.normpath(file) not in listed:
            skipped.add(NOT_LISTED, file)
    for reason, number in beside.counts.items():
        skipped.add(BESIDE if reason.startswith(NOT_AN_IMAGE) else reason, beside.examples[reason], number)
    return replace(dataset, skipped=skipped)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # a name too long for the file system, or with a NUL; or the disk fails
        fault = resource_error(error, f"read {path}")
        if fault is not None:
            raise fault from error
        return False
