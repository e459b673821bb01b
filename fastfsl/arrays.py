"""Checks of the arrays that estimators are given: numbers, finite, of unit length, labels in range."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastfsl.errors import DataError, ShapeError


def numbers(values: ArrayLike, name: str, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """A non-empty array of finite numbers.

    Args:
        values: array-like; a torch tensor must be on the CPU and need no gradient.
        name: what messages call it.
        dtype: floating type to convert to.

    Raises:
        ShapeError: ragged, empty or not numbers.
        DataError: a value is not finite, or larger than `dtype` holds; its row is named.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ShapeError(f"expected {name} to be an array of numbers: {error}") from error
    if array.dtype.kind not in "fiu" or array.size == 0:
        raise ShapeError(f"expected {name} to be a non-empty array of numbers, got {array.dtype} {array.shape}")
    _refuse_infinite(array, name, "NaN or infinity")
    with np.errstate(over="ignore"):
        converted: NDArray[Any] = array.astype(dtype)
    _refuse_infinite(converted, name, f"a value larger than {np.dtype(dtype)} holds")
    return converted


def unit(array: NDArray[Any], name: str) -> NDArray[Any]:
    """The vectors along the last axis at unit length, whatever their length was.

    Raises:
        DataError: a vector is zero; its row is named.
    """
    largest = np.abs(array).max(axis=-1, keepdims=True)
    if not largest.all():
        row = int(np.argwhere(largest == 0)[0][0])
        raise DataError(f"expected non-zero {name}, got a zero vector in row {row}: it has no direction; remove it")
    scaled = array / largest  # so that no square over- or underflows
    result: NDArray[Any] = scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)
    return result


def unit_rows(values: ArrayLike, name: str, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Rows (rows, d) of finite numbers, none of them zero, at unit length.

    Raises:
        ShapeError: not a two-dimensional array of numbers.
        DataError: a value is not finite or a row is zero.
    """
    array = numbers(values, name, dtype)
    if array.ndim != 2:
        raise ShapeError(f"expected {name} (rows, d), got {array.shape}")
    return unit(array, name)


def unit_views(values: ArrayLike, name: str, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Features (n, d) or of V views (n, V, d), at unit length, as (n, V, d); V = 1 for the former.

    Raises:
        ShapeError: of another rank, or no numbers.
        DataError: a value is not finite or a vector is zero.
    """
    array = numbers(values, name, dtype)
    if array.ndim not in (2, 3):
        raise ShapeError(f"expected {name} (n, d) or (n, V, d), got {array.shape}")
    return unit(array if array.ndim == 3 else array[:, None], name)


def check_labels(labels: ArrayLike, num_samples: int, num_classes: int) -> NDArray[np.int64]:
    """Class indices, (num_samples,).

    Raises:
        ShapeError: not one a sample.
        DataError: not integers in 0 .. num_classes - 1.
    """
    array = np.asarray(labels)
    if array.shape != (num_samples,):
        raise ShapeError(f"expected labels ({num_samples},), one a sample, got {array.shape}")
    if array.dtype.kind not in "iu":
        raise DataError(f"expected integer labels, got {array.dtype}: pass class indices 0..{num_classes - 1}")
    if array.min() < 0 or array.max() >= num_classes:
        raise DataError(
            f"expected labels in 0..{num_classes - 1} (one a class embedding), got {array.min()}..{array.max()}"
        )
    return array.astype(np.int64)


def check_width(features_width: int, embeddings_width: int) -> None:
    """Refuse features and class embeddings of different widths.

    Raises:
        ShapeError: naming both.
    """
    if features_width != embeddings_width:
        raise ShapeError(
            f"expected features and class embeddings of one width, got {features_width} and {embeddings_width}: "
            "both must come from the same CLIP model"
        )


def _refuse_infinite(array: NDArray[np.generic], name: str, what: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise DataError(f"expected finite {name}, got {what} (first in row {row}): remove or repair that row")
