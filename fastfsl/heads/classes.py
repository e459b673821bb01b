"""Which class a label means, and which row of the class embeddings is its text."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastfsl.arrays import as_array, check_labels, label_array
from fastfsl.errors import DataError, ShapeError

# Text features of the classes: rows, or a row by class.
ClassEmbeddings = ArrayLike | Mapping[Any, ArrayLike] | None


@dataclass(frozen=True)
class Classes:
    """The classes of a fit, ascending, as scikit-learn has them.

    Attributes:
        names: `classes_`, (C,): texts, numbers or bools.
        labels: the class index of each sample, (n,).
        class_embeddings: the row of each class, (C, d), not checked yet; None: there are none.
        named: the caller says which classes there are, so that one may have no sample.
    """

    names: NDArray[Any]
    labels: NDArray[np.int64]
    class_embeddings: NDArray[Any] | None
    named: bool


def match_classes(
    labels: object, num_samples: int, class_embeddings: ClassEmbeddings, class_names: Sequence[Any] | None
) -> Classes:
    """Match labels with class embeddings.

    The rows of the embeddings E belong, in this order of preference, to
        - the keys of E if it is a mapping, or `class_names`, one per row, or the texts of a data frame's index;
        - 0 .. C-1, if all labels are whole numbers among these: a label is the index of its row;
        - the distinct labels in ascending order, if there are C of them.
    Integer labels with a mapping from other classes count its keys in ascending order, which is what scikit-learn's
    `LabelEncoder` makes of labels inside some meta-estimators.

    Args:
        labels: of any kind that `label_array` takes, (n,).
        num_samples: n.
        class_embeddings: text features (C, d) or a vector by class.
        class_names: the class of each row, as the labels have it.

    Raises:
        ShapeError: not one label per sample.
        DataError: the labels and the rows cannot be matched.
    """
    found = _column(labels, num_samples)
    rows: NDArray[Any] | None = None
    if isinstance(class_embeddings, Mapping):
        if class_names is not None and set(class_names) != set(class_embeddings):
            raise DataError("expected class_embeddings by class or class_names, got both and they differ")
        keys = list(class_embeddings)
        names = _distinct(keys, "class_embeddings")
        rows = _rows([as_array(class_embeddings[key], f"class_embeddings[{key!r}]") for key in keys])
        if _are_positions(found, names):
            ascending = rows[np.argsort(names)]
            return Classes(np.arange(len(names)), check_labels(found, num_samples, len(names)), ascending, named=True)
        return _named(found, names, rows)
    if class_embeddings is not None:
        rows = _rows(class_embeddings)
        if class_names is None:
            class_names = _index_names(class_embeddings, found)
    if class_names is not None:
        names = _distinct(class_names, "class_names")
        if rows is not None and len(rows) != len(names):
            raise DataError(f"expected one class name per row of class_embeddings ({len(rows)}), got {len(names)}")
        return _named(found, names, rows)
    distinct = np.unique(found)
    if rows is None:
        return Classes(distinct, np.searchsorted(distinct, found), rows, named=False)
    return _by_position(found, distinct, rows)


def same_kind(labels: NDArray[Any], names: NDArray[Any]) -> bool:
    """Whether both are texts, or neither."""
    return _kind(labels) == _kind(names)


def _by_position(labels: NDArray[Any], distinct: NDArray[Any], rows: NDArray[Any]) -> Classes:
    num_classes = len(rows)
    if labels.dtype.kind == "b" and num_classes == 2:
        return Classes(np.array([False, True]), labels.astype(np.int64), rows, named=False)
    if labels.dtype.kind in "if" and distinct[0] >= 0 and distinct[-1] < num_classes:
        if distinct[0] == 1 and len(distinct) == num_classes - 1:
            warnings.warn(
                f"there are {num_classes} class embeddings and no label 0: labels are taken for rows counted from 0. "
                f"If they count from 1, and class {num_classes} has no sample, pass "
                f"class_names=range(1, {num_classes + 1})",
                UserWarning,
                stacklevel=5,
            )
        return Classes(np.arange(num_classes, dtype=labels.dtype), labels.astype(np.int64), rows, named=False)
    if len(distinct) != num_classes:
        raise DataError(
            f"expected labels in 0..{num_classes - 1} (rows of class_embeddings), or as many distinct labels as there "
            f"are rows, got {len(distinct)} distinct ones, {distinct[0]}..{distinct[-1]}, for {num_classes} rows: pass "
            "class_names, the class of each row, or class_embeddings as a mapping from class to row"
        )
    return Classes(distinct, np.searchsorted(distinct, labels), rows, named=False)


def _named(labels: NDArray[Any], names: NDArray[Any], rows: NDArray[Any] | None) -> Classes:
    order = np.argsort(names)
    ascending = names[order]
    advice = ""
    if not same_kind(labels, names):
        if _kind(labels) == "number" and _kind(names) == "text" and (ascending == names).all():
            # The index of a row and the index in ascending order are the same here.
            return Classes(np.arange(len(names)), check_labels(labels, len(labels), len(names)), rows, named=True)
        advice = ": pass labels as names, np.array(class_names)[labels], or leave class_names out"
    unknown = [] if advice else np.setdiff1d(labels, names).tolist()
    if advice or unknown:
        listed = ", ".join(map(repr, unknown[:5])) or f"{labels.dtype} labels for {names.dtype} names"
        raise DataError(f"expected labels among the {len(names)} named classes, got {listed}{advice}")
    ordered = None if rows is None else rows[order]
    return Classes(ascending, np.searchsorted(ascending, labels), ordered, named=True)


def _are_positions(labels: NDArray[Any], names: NDArray[Any]) -> bool:
    """Whether labels count the names, in ascending order, and cannot be the names themselves."""
    if _kind(labels) != "number" or labels.dtype.kind == "b":
        return False
    if _kind(names) == "text":
        return True
    return np.array_equal(np.unique(labels), np.arange(len(names))) and bool(np.setdiff1d(labels, names).size)


def _rows(class_embeddings: object) -> NDArray[Any]:
    rows = as_array(class_embeddings, "class_embeddings")
    if rows.ndim != 2 or len(rows) == 0:
        raise ShapeError(f"expected class_embeddings (rows, d), one row per class, got {rows.shape}")
    return rows


def _index_names(class_embeddings: object, labels: NDArray[Any]) -> list[str] | None:
    """The texts in the index of a data frame, one per row; None where it has none, or says no more.

    Raises:
        DataError: they are not the names that the labels have, or labels may count rows or names, which differ.
    """
    if not hasattr(class_embeddings, "iloc") or not hasattr(class_embeddings, "index"):
        return None
    names = list(class_embeddings.index)
    if not all(isinstance(name, str) for name in names):
        return None
    if _kind(labels) == "number":
        if names == sorted(names):
            return None
        raise DataError(
            f"expected labels among the names in the index of class_embeddings, got {labels.dtype}: pass labels as "
            "names, class_embeddings.to_numpy() if labels are numbers of its rows, or a mapping from name to row where "
            "a meta-estimator numbers the names in ascending order"
        )
    unknown = np.setdiff1d(labels, np.array(names)).tolist()
    if unknown:
        raise DataError(
            "expected the index of class_embeddings to name the classes, got no row for "
            f"{', '.join(map(repr, unknown[:5]))}: pass class_embeddings.to_numpy() if its rows follow the distinct "
            "labels in ascending order"
        )
    return names


def _column(labels: object, num_samples: int) -> NDArray[Any]:
    """The labels, also of a column (n, 1), with scikit-learn's warning."""
    array = None if labels is None else as_array(labels, "labels")
    if array is not None and array.shape == (num_samples, 1):
        from sklearn.exceptions import DataConversionWarning

        warnings.warn(
            "A column-vector y was passed when a 1d array was expected. Please change the shape of y to (n_samples,), "
            "for example using ravel().",
            DataConversionWarning,
            stacklevel=5,
        )
        array = array[:, 0]
    return label_array(array, num_samples)


def _distinct(names: Sequence[Any], what: str) -> NDArray[Any]:
    array = label_array(list(names))
    values, counts = np.unique(array, return_counts=True)
    if len(array) == 0 or counts.max() > 1:
        twice = "none" if len(array) == 0 else f"{values[counts > 1][0]} more than once"
        raise DataError(f"expected the classes of {what} to be distinct, got {twice}")
    return array


def _kind(array: NDArray[Any]) -> str:
    return "text" if array.dtype.kind == "U" else "number"
