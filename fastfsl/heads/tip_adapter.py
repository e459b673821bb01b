"""Tip-Adapter: a cache of the support, added to the zero-shot logits."""

from collections.abc import Iterator

import numpy as np

from fastfsl.heads.base import Head, check_grid
from fastfsl.heads.blending import Candidate, Selection, select
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.folds import Folds
from fastfsl.heads.form import KernelForm, LinearForm, sharpened
from fastfsl.heads.nearest_mean import one_hot
from fastfsl.heads.support import Array, Labels, Support

# The published value, under the one-shot rule.
ONE_SHOT_BETA = 5.5


class TipAdapter(Head):
    """logits = a · x Tᵀ + alpha · exp(-beta (1 - x Sᵀ)) Y.

    The keys are the support S (n, d). The values Y (n, C) are one-hot labels, divided by the class's number of samples,
    so that alpha means the same for folds and for the whole support, and large classes are not preferred; between
    classes of one size that is a factor in alpha. beta by cross-validation over a grid, a and alpha as `blending` tells
    (a is 100 in the paper: a common factor of both is a temperature).

    Args:
        betas: sharpnesses to choose among.
        logit_scale: scale of the zero-shot cosines that a is drawn to; None means 100.
        num_folds: cross-validation folds at most.
        seed: seed of the folds.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Attributes:
        alpha_: the chosen alpha.
        beta_: the chosen beta.

    Source: Tip-Adapter (arXiv 2207.09519).
    """

    def __init__(
        self,
        *,
        betas: tuple[float, ...] = (1.0, 2.0, 4.0, 5.5, 8.0, 12.0, 16.0, 24.0),
        logit_scale: float | None = None,
        num_folds: int = 4,
        seed: int = 0,
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.betas = betas
        self.logit_scale = logit_scale
        self.num_folds = num_folds
        self.seed = seed
        self.class_embeddings = class_embeddings

    def _fit(self, support: Support) -> tuple[KernelForm, Selection]:
        folds = self._folds(support)
        betas = self.betas if folds.rule == "folds" else (ONE_SHOT_BETA,)
        selection = select(cache_candidates(support, folds, betas), folds, self._scale())
        self.alpha_, self.beta_ = selection.score_weight, selection.settings["beta"]
        prior = LinearForm(selection.prior_weight * support.class_embeddings, np.zeros(support.num_classes))
        values = self.alpha_ * cache_values(support.labels, support.num_classes)
        return KernelForm(prior, support.features, values, self.beta_), selection

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does."""
        super().check_parameters()
        check_grid("betas", self.betas)


def cache_values(labels: Labels, num_classes: int) -> Array:
    """One-hot labels over the class's number of samples, (n, C)."""
    return one_hot(labels, num_classes) / np.bincount(labels, minlength=num_classes)[labels][:, None]


def cache_candidates(support: Support, folds: Folds, betas: tuple[float, ...]) -> Iterator[Candidate]:
    """For each beta the mean affinity to every class, (n, C), of samples whose fold is not in the cache."""
    cosines = support.plain @ support.features.T
    prior = support.plain @ support.class_embeddings.T
    for beta in betas:
        kernel = sharpened(cosines, beta)
        scores = np.zeros_like(prior)
        for train, held_out in folds:
            values = cache_values(support.labels[train], support.num_classes)
            scores[held_out] = kernel[np.ix_(held_out, train)] @ values
        yield Candidate({"beta": beta}, scores, prior)
