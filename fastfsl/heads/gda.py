"""Gaussian discriminant analysis added to zero-shot logits."""

from typing import Literal

import numpy as np
from scipy.linalg import solve

from fastfsl.errors import ConfigError
from fastfsl.heads.base import Head
from fastfsl.heads.blending import Candidate, Selection, select
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.folds import Folds
from fastfsl.heads.form import LinearForm
from fastfsl.heads.nearest_mean import class_means
from fastfsl.heads.support import Array, Labels, Support

Views = Literal["always", "one-shot", "mean"]

# A scatter of unit vectors below this is rounding: the samples of every class are copies of each other.
_NO_SCATTER = 1e-12


class GDA(Head):
    """Gaussian classes with a shared covariance, their log-odds added to the zero-shot logits.

    With class means μ (C, d), pooled covariance Σ (d, d) about them and n samples,

        P = (n - 1) · ((n - 1) Σ + tr(Σ) I)⁻¹,   W = μ P,   β_c = -½ μ_cᵀ P μ_c,   logits = a · x Tᵀ + b · (x Wᵀ + β),

    with equal class priors. (The paper has d for the first n - 1, a factor in b. With it the logits would shrink as n
    grows, and b from the folds, which have fewer samples, would be too small for the whole support.) The covariance
    within the classes is zero where each has one sample; there Σ is the total covariance, about the mean of all.
    Augmented views count as samples, so that there is a covariance at one shot: the released code's form for one shot,
    and better at more (benchmarks/results/gda_views.json). a and b are chosen as `blending` tells.

    Args:
        views: when the views of an image count as samples: `always`, at `one-shot`, or never, where their `mean` does.
        logit_scale: scale of the zero-shot cosines that a is drawn to; None means 100.
        num_folds: cross-validation folds at most.
        seed: seed of the folds.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Source: "A hard-to-beat baseline for training-free CLIP-based adaptation" (arXiv 2402.04087).
    """

    def __init__(
        self,
        *,
        views: Views = "always",
        logit_scale: float | None = None,
        num_folds: int = 4,
        seed: int = 0,
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.views = views
        self.logit_scale = logit_scale
        self.num_folds = num_folds
        self.seed = seed
        self.class_embeddings = class_embeddings

    def _fit(self, support: Support) -> tuple[LinearForm, Selection]:
        folds = self._folds(support)
        scores = np.zeros((len(support.labels), support.num_classes))
        for train, held_out in folds:
            gaussian = _discriminant(*self._samples(support, folds, train), support.num_classes)
            scores[held_out] = gaussian.apply(support.plain[held_out])
        prior = support.plain @ support.class_embeddings.T
        selection = select([Candidate({}, scores, prior)], folds, self._scale())
        gaussian = _discriminant(*self._samples(support, folds, np.arange(len(scores))), support.num_classes)
        weight = selection.prior_weight * support.class_embeddings + selection.score_weight * gaussian.weight
        return LinearForm(weight, selection.score_weight * gaussian.bias), selection

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does."""
        super().check_parameters()
        if self.views not in ("always", "one-shot", "mean"):
            raise ConfigError(f"expected views 'always', 'one-shot' or 'mean', got {self.views!r}")

    def _samples(self, support: Support, folds: Folds, index: Labels) -> tuple[Array, Labels]:
        """What the Gaussians are fitted to, and its labels: the views of these images, or the mean of each one's."""
        labels = support.labels[index]
        if self.views == "always" or (self.views == "one-shot" and folds.rule == "one-shot"):
            views = support.views[index]
            return views.reshape(-1, views.shape[2]), labels.repeat(views.shape[1])
        return support.features[index], labels


def _discriminant(features: Array, labels: Labels, num_classes: int) -> LinearForm:
    """W (C, d) and β (C,); zero for a class without samples."""
    num_samples, dim = features.shape
    means = class_means(features, labels, num_classes)
    centred = features - means[labels]
    if (centred**2).sum() < _NO_SCATTER * num_samples:
        centred = features - features.mean(axis=0)
    scatter = centred.T @ centred  # (n - 1) Σ
    trace = float(np.trace(scatter)) / max(num_samples - 1, 1)  # tr(Σ)
    if trace < _NO_SCATTER:
        weight = means  # all samples are one point: no direction is known to vary more than another
    else:
        weight = (num_samples - 1) * solve(scatter + trace * np.eye(dim), means.T, assume_a="pos").T
    return LinearForm(weight, -0.5 * (weight * means).sum(axis=1))
