"""Labels of a feature file: texts and other integers become indices of rows of the class embeddings."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.data.dataset import check_distinct
from fastfsl.errors import DataError, ShapeError

_AnyArray = NDArray[Any]


def match_labels(
    path: Path, labels: Mapping[str, _AnyArray], class_names: _AnyArray | None, num_classes: int
) -> tuple[tuple[str, ...], dict[str, _AnyArray]]:
    """Match the labels of all splits with the classes.

    Args:
        path: the file, for messages.
        labels: arrays of labels by name.
        class_names: the class of each row of the class embeddings; None: the file has none.
        num_classes: C.

    Returns:
        The class names, and the labels by name: indices where they could be matched. Labels that are neither texts nor
        integers, and integers that mean no class, are left as they are.

    Raises:
        ShapeError: class names that are no texts or not one per row.
        DataError: text labels that are not the names of the classes.
    """
    decoded = {name: _decoded(path, name, array) for name, array in labels.items()}
    names = None if class_names is None else _class_names(path, _decoded(path, "class_names", class_names), num_classes)
    texts = [name for name, array in decoded.items() if array.dtype.kind == "U"]
    if texts and len(texts) < len(decoded):
        other = next(name for name in decoded if name not in texts)
        raise DataError(
            f"{path}: {texts[0]} holds texts and {other} {decoded[other].dtype}: expected labels of one kind"
        )
    if not texts:
        return _of_integers(decoded, names, num_classes)
    if names is None:
        distinct = np.unique(np.concatenate([array.ravel() for array in decoded.values()]))
        if len(distinct) != num_classes:
            raise DataError(
                f"{path}: the labels name {len(distinct)} classes ({_some(distinct)}), class_embeddings has "
                f"{num_classes} rows: add class_names, the class of each row"
            )
        names = _class_names(path, distinct, num_classes)
    index = {name: label for label, name in enumerate(names)}
    for name, array in decoded.items():
        for row, label in enumerate(array.ravel().tolist()):
            if label not in index:
                close = difflib.get_close_matches(label, names, n=1)
                raise DataError(
                    f"{path}: {name}[{row}] is {label!r}, which is none of the {num_classes} classes"
                    + (f": did you mean {close[0]!r}?" if close else f" ({_some(np.array(names))})")
                )
    found = {
        name: np.array([index[label] for label in array.ravel().tolist()], np.int64).reshape(array.shape)
        for name, array in decoded.items()
    }
    return names, found


def _of_integers(
    labels: Mapping[str, _AnyArray], names: tuple[str, ...] | None, num_classes: int
) -> tuple[tuple[str, ...], dict[str, _AnyArray]]:
    """Integers in [0, C) stay; of others, of which C are distinct, the rows follow the ascending ones."""
    values = range(num_classes)
    distinct: list[int] = []
    if all(array.dtype.kind in "iu" for array in labels.values()):  # Python's integers: of any size and sign
        distinct = sorted({value for array in labels.values() for value in np.unique(array).tolist()})
    if len(distinct) == num_classes and distinct != list(values):
        found = {name: np.searchsorted(np.array(distinct), array) for name, array in labels.items()}
        return names or tuple(f"class {value}" for value in distinct), found
    return names or tuple(f"class {value}" for value in values), dict(labels)


def _class_names(path: Path, names: _AnyArray, num_classes: int) -> tuple[str, ...]:
    if names.dtype.kind != "U":
        raise ShapeError(f"{path}: class_names has type {names.dtype}, expected text: numpy.array(names, dtype=str)")
    if names.shape != (num_classes,):
        raise ShapeError(f"{path}: class_names has shape {names.shape}, expected ({num_classes},) as class_embeddings")
    listed = tuple(str(name) for name in names)
    empty = next((label for label, name in enumerate(listed) if not name.strip()), None)
    if empty is not None:
        raise DataError(f"{path}: class_names[{empty}] is empty")
    check_distinct(path, listed)
    return listed


def _decoded(path: Path, name: str, array: _AnyArray) -> _AnyArray:
    """Texts that are kept as bytes, in UTF-8."""
    if array.dtype.kind != "S":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {name} holds bytes that are no UTF-8 ({error}): save texts with dtype=str") from error


def _some(names: _AnyArray) -> str:
    return ", ".join(map(repr, names[:5].tolist())) + (", ..." if len(names) > 5 else "")
