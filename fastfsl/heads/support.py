"""The checked arrays that a head is fitted on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastfsl.arrays import check_labels, check_width, unit, unit_rows, unit_views
from fastfsl.errors import DataError, ShapeError

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Support:
    """A support set in a canonical order, so that the order in which samples are given changes nothing.

    Attributes:
        features: unit support vectors, (n, d).
        views: unit features of the V views that each is the mean of, (n, V, d); V = 1 where there is no other.
        plain: unit features of the same samples as they will be classified, (n, d): what is held out.
        labels: class indices, (n,), ascending.
        class_embeddings: unit text features, (C, d).
        order: where the samples stood in what was given, (n,).
    """

    features: Array
    views: Array
    plain: Array
    labels: Labels
    class_embeddings: Array
    order: Labels

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
    views = unit_views(features, "features")
    vectors = views[:, 0] if views.shape[1] == 1 else unit(views.mean(axis=1), "means over the views of features")
    embeddings = unit_rows(class_embeddings, "class_embeddings")
    check_width(vectors.shape[1], embeddings.shape[1])
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
    keys = [
        (int(label), row.tobytes(), own.tobytes(), view.tobytes())
        for label, row, own, view in zip(targets, vectors, plain, views, strict=True)
    ]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    return Support(vectors[order], views[order], plain[order], targets[order], embeddings, order)
