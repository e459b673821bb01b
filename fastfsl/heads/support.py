"""The checked arrays that a head is fitted on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastfsl.errors import DataError, ShapeError

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Support:
    """A support set in a canonical order, so that the order in which samples are given changes nothing.

    Attributes:
        features: unit support vectors, (n, d).
        plain: unit features of the same samples as they will be classified, (n, d): what is held out.
        labels: class indices, (n,), ascending.
        class_embeddings: unit text features, (C, d).
    """

    features: Array
    plain: Array
    labels: Labels
    class_embeddings: Array

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_embeddings)

    @property
    def counts(self) -> Labels:
        """Samples by class, (C,)."""
        return np.bincount(self.labels, minlength=self.num_classes)


def check_support(
    features: ArrayLike, labels: ArrayLike, class_embeddings: ArrayLike, plain_features: ArrayLike | None
) -> Support:
    """Check the arguments of `fit`; of several views of a sample take the renormalised mean.

    Raises:
        ShapeError: the shapes do not fit together.
        DataError: a value is not finite, a row is zero, a label names no class or a class has no sample.
    """
    views = _numbers(features, "features")
    if views.ndim not in (2, 3):
        raise ShapeError(f"expected features (n, d) or (n, V, d), got {views.shape}")
    vectors = _unit(views, "features")
    if vectors.ndim == 3:
        vectors = _unit(vectors.mean(axis=1), "means over the views of features")
    embeddings = unit_rows(class_embeddings, "class_embeddings")
    if embeddings.shape[1] != vectors.shape[1]:
        raise ShapeError(
            f"expected features and class embeddings of one width, got {vectors.shape[1]} and {embeddings.shape[1]}: "
            "both must come from the same CLIP model"
        )
    targets = check_labels(labels, len(vectors), len(embeddings))
    empty = np.flatnonzero(np.bincount(targets, minlength=len(embeddings)) == 0)
    if empty.size:
        raise DataError(
            f"expected a sample of every class, got none of {', '.join(map(str, empty[:5]))}"
            f"{', ...' if empty.size > 5 else ''}: add one, or leave these class embeddings out"
        )
    plain = vectors if plain_features is None else unit_rows(plain_features, "plain_features")
    if plain.shape != vectors.shape:
        raise ShapeError(f"expected plain_features {vectors.shape}, one a sample, got {plain.shape}")
    keys = [(int(label), row.tobytes(), own.tobytes()) for label, row, own in zip(targets, vectors, plain, strict=True)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    return Support(vectors[order], plain[order], targets[order], embeddings)


def unit_rows(values: ArrayLike, name: str) -> Array:
    """Check that these are rows (rows, d) of finite numbers, none of them zero, and give each unit length.

    Raises:
        ShapeError: not a two-dimensional array of numbers.
        DataError: a value is not finite or a row is zero.
    """
    array = _numbers(values, name)
    if array.ndim != 2:
        raise ShapeError(f"expected {name} (rows, d), got {array.shape}")
    return _unit(array, name)


def check_labels(labels: ArrayLike, num_samples: int, num_classes: int) -> Labels:
    """Check class indices, (num_samples,).

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


def _numbers(values: ArrayLike, name: str) -> Array:
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ShapeError(f"expected {name} to be an array of numbers: {error}") from error
    if array.dtype.kind not in "fiu" or array.size == 0:
        raise ShapeError(f"expected {name} to be a non-empty array of numbers, got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise DataError(f"expected finite {name}, got NaN or infinity (first in row {row}): remove or repair that row")
    return array.astype(np.float64)


def _unit(array: Array, name: str) -> Array:
    largest = np.abs(array).max(axis=-1, keepdims=True)
    if not largest.all():
        row = int(np.argwhere(largest == 0)[0][0])
        raise DataError(f"expected non-zero {name}, got a zero vector in row {row}: it has no direction; remove it")
    array = array / largest  # so that no square over- or underflows
    unit: Array = array / np.linalg.norm(array, axis=-1, keepdims=True)
    return unit
