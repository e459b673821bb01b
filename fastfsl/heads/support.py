"""The checked arrays that a head is fitted on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastfsl.arrays import check_width, unit, unit_rows, unit_views
from fastfsl.errors import DataError, ShapeError
from fastfsl.heads.classes import ClassEmbeddings, Classes, match_classes

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

# A shorter vector is rounding error: the difference of two equal unit vectors.
_NO_LENGTH = 1e-12


@dataclass(frozen=True)
class Support:
    """A support set in a canonical order, so that the order in which samples are given changes nothing.

    Attributes:
        features: unit support vectors, (n, d).
        views: unit features of the V views that each is the mean of, (n, V, d); V = 1 where there is no other.
        plain: unit features of the same samples as they will be classified, (n, d): what is held out.
        labels: class indices, (n,), ascending.
        class_embeddings: unit text features, (C, d); zeros where there are no texts, so that there is no prior.
        order: where the samples stood in what was given, (n,); those beyond stand in for classes without any.
        given: labels and class embeddings as they were given, matched with the classes.
    """

    features: Array
    views: Array
    plain: Array
    labels: Labels
    class_embeddings: Array
    order: Labels
    given: Classes

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_embeddings)

    @property
    def counts(self) -> Labels:
        """Samples by class, (C,)."""
        return np.bincount(self.labels, minlength=self.num_classes)


def check_support(
    features: ArrayLike,
    labels: ArrayLike,
    class_embeddings: ClassEmbeddings,
    plain_features: ArrayLike | None,
    class_names: Sequence[Any] | None = None,
) -> Support:
    """Check the arguments of `fit`; of several views of a sample take the renormalised mean.

    A class without a sample is an error, unless the classes are named. Then its text, moved from where the texts are to
    where the images are, stands in as its one sample: unit(t_c + m - t), m the mean of the class means, t of the texts.

    Raises:
        ShapeError: the shapes do not fit together.
        DataError: a value is not finite, a row is zero, labels and rows of class embeddings cannot be matched, or a
            class has no sample.
    """
    views = unit_views(features, "features")
    vectors = views[:, 0] if views.shape[1] == 1 else unit(views.mean(axis=1), "means over the views of features")
    classes = match_classes(labels, len(vectors), class_embeddings, class_names)
    embeddings = _embeddings(classes, vectors.shape[1])
    plain = vectors if plain_features is None else unit_rows(plain_features, "plain_features")
    if plain.shape != vectors.shape:
        raise ShapeError(f"expected plain_features {vectors.shape}, one a sample, got {plain.shape}")
    targets = classes.labels
    empty = np.flatnonzero(np.bincount(targets, minlength=len(embeddings)) == 0)
    if empty.size and (not classes.named or classes.class_embeddings is None):
        names = ", ".join(map(str, classes.names[empty[:5]].tolist()))
        raise DataError(
            f"expected a sample of every class, got none of {names}{', ...' if empty.size > 5 else ''}: add one, leave "
            "these class embeddings out, or pass class_names and class_embeddings to let the text stand in"
        )
    if empty.size:
        stand_ins = _stand_ins(vectors, targets, embeddings)[empty]
        plain = np.concatenate([plain, stand_ins])
        views = np.concatenate([views, np.repeat(stand_ins[:, None], views.shape[1], axis=1)])
        vectors, targets = np.concatenate([vectors, stand_ins]), np.concatenate([targets, empty])
    keys = [
        (int(label), row.tobytes(), own.tobytes(), view.tobytes())
        for label, row, own, view in zip(targets, vectors, plain, views, strict=True)
    ]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    return Support(vectors[order], views[order], plain[order], targets[order], embeddings, order, classes)


def with_centred_texts(support: Support) -> Support:
    """The support, with the class texts t_c replaced by the directions in which they differ, unit(P (t_c - t)).

    t is the mean of the texts, and P projects onto what is perpendicular to the mean of the class means. In cosines
    with the texts themselves, what all texts or all images have in common favours some classes; here it favours none.
    """
    texts = support.class_embeddings
    seen = np.unique(support.labels)
    centre = np.stack([support.features[support.labels == label].mean(axis=0) for label in seen]).mean(axis=0)
    axis = _unit_or_zero(centre)
    across = texts - texts.mean(axis=0)
    across = across - (across @ axis)[:, None] * axis
    return replace(support, class_embeddings=_unit_or_zero(across))


def _unit_or_zero(vectors: Array) -> Array:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > _NO_LENGTH, vectors / np.maximum(length, _NO_LENGTH), 0.0)


def _embeddings(classes: Classes, width: int) -> Array:
    if classes.class_embeddings is None:
        return np.zeros((len(classes.names), width))
    embeddings = unit_rows(classes.class_embeddings, "class_embeddings")
    check_width(width, embeddings.shape[1])
    return embeddings


def _stand_ins(vectors: Array, labels: Labels, embeddings: Array) -> Array:
    seen = np.unique(labels)
    centre = np.stack([vectors[labels == label].mean(axis=0) for label in seen]).mean(axis=0)
    return unit(embeddings + centre - embeddings.mean(axis=0), "stand-ins for classes without a sample")
