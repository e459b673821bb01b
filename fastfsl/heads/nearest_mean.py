"""Nearest class mean."""

import numpy as np

from fastfsl.heads.base import Head
from fastfsl.heads.blending import Candidate, Selection, select
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.form import LinearForm
from fastfsl.heads.support import Array, Labels, Support


class NearestMean(Head):
    """logits = b · x Mᵀ, M (C, d) the renormalised means of the classes' support vectors; text is not used.

    Args:
        num_folds: cross-validation folds at most, for the factor b (a temperature: predictions do not depend on it).
        seed: seed of the folds.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Source: prototypical networks (arXiv 1703.05175) on frozen features, with cosine similarity.
    """

    def __init__(
        self,
        *,
        num_folds: int = 4,
        seed: int = 0,
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.num_folds = num_folds
        self.seed = seed
        self.class_embeddings = class_embeddings

    def _fit(self, support: Support) -> tuple[LinearForm, Selection]:
        folds = self._folds(support)
        scores = np.zeros((len(support.labels), support.num_classes))
        for train, held_out in folds:
            means = unit_class_means(support.features[train], support.labels[train], support.num_classes)
            scores[held_out] = support.plain[held_out] @ means.T
        selection = select([Candidate({}, scores)], folds, self._scale())
        means = unit_class_means(support.features, support.labels, support.num_classes)
        return LinearForm(selection.score_weight * means, np.zeros(support.num_classes)), selection


def class_means(features: Array, labels: Labels, num_classes: int) -> Array:
    """Means of the classes' rows, (C, d); zero where a class has none."""
    means = one_hot(labels, num_classes).T @ features
    return means / np.maximum(np.bincount(labels, minlength=num_classes), 1)[:, None]


def one_hot(labels: Labels, num_classes: int) -> Array:
    """Indicators of the classes, (n, C)."""
    return np.eye(num_classes)[labels]


def unit_class_means(features: Array, labels: Labels, num_classes: int) -> Array:
    """The means at unit length; zero where a class has none."""
    means = class_means(features, labels, num_classes)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return means / np.where(lengths > 0, lengths, 1)
