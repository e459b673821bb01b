"""LP++: a linear probe blended with the class text, by majorise-minimise steps."""

from collections.abc import Iterator

import numpy as np
from scipy.special import softmax

from fastfsl.errors import ConfigError
from fastfsl.heads.base import Head
from fastfsl.heads.blending import Candidate, Selection, fit_weights, select
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.folds import Folds
from fastfsl.heads.form import LinearForm
from fastfsl.heads.nearest_mean import one_hot
from fastfsl.heads.support import Array, Labels, Support

# Under the one-shot rule.
_ONE_SHOT_ITERATIONS = 30


class LPPlusPlus(Head):
    """logits_c = b · (x - m) · (w_c + α_c t_c): prototypes w (C, d) and one multiplier α_c a class for its text t_c.

    Cross-entropy over w and α, m the support's mean, in steps without a learning rate: the Hessian of the softmax is at
    most ½, so that the loss has gradients of Lipschitz constants

        L_w = ½ λ_max((X - m)ᵀ(X - m) / n),    L_α,c = ½ mean_i ((x_i - m) · t_c)²

    and twice both bounds the two blocks together. From w = 0 and α the text's best temperature on the support, with
    Nesterov's momentum, which takes tens of the published hundreds of steps. The loss has no penalty: the number of
    steps is its regularisation, by cross-validation over a grid; b is a temperature, as `blending` tells.

    Args:
        iterations: numbers of steps to choose among.
        logit_scale: scale of the zero-shot cosines that the first α is drawn to; None means 100.
        num_folds: cross-validation folds at most.
        seed: seed of the folds.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Attributes:
        iterations_: the chosen number of steps.
        multipliers_: α, (C,).

    Source: LP++ (arXiv 2404.02285); centring, the joint step and momentum are this implementation's.
    """

    def __init__(
        self,
        *,
        iterations: tuple[int, ...] = (10, 20, 40, 80, 160, 320),
        logit_scale: float | None = None,
        num_folds: int = 4,
        seed: int = 0,
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.iterations = iterations
        self.logit_scale = logit_scale
        self.num_folds = num_folds
        self.seed = seed
        self.class_embeddings = class_embeddings

    def _fit(self, support: Support) -> tuple[LinearForm, Selection]:
        folds = self._folds(support)
        selection = select(self._candidates(support, folds), folds, self._scale())
        self.iterations_ = int(selection.settings["iterations"])
        ((probe, self.multipliers_),) = self._path(
            support.features, support.labels, support.class_embeddings, (self.iterations_,)
        )
        return LinearForm(selection.score_weight * probe.weight, selection.score_weight * probe.bias), selection

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does."""
        super().check_parameters()
        if not self.iterations or min(self.iterations) < 1:
            raise ConfigError(f"expected iterations to be one or more numbers >= 1, got {self.iterations}")

    def _candidates(self, support: Support, folds: Folds) -> Iterator[Candidate]:
        grid = tuple(sorted(set(self.iterations))) if folds.rule == "folds" else (_ONE_SHOT_ITERATIONS,)
        scores = np.zeros((len(grid), len(support.labels), support.num_classes))
        for train, held_out in folds:
            if not train.size:  # a support of one sample
                continue
            path = self._path(support.features[train], support.labels[train], support.class_embeddings, grid)
            for position, (probe, _) in enumerate(path):
                scores[position, held_out] = probe.apply(support.plain[held_out])
        for iterations, held_out_scores in zip(grid, scores, strict=True):
            yield Candidate({"iterations": iterations}, held_out_scores)

    def _path(
        self, features: Array, labels: Labels, texts: Array, stops: tuple[int, ...]
    ) -> Iterator[tuple[LinearForm, Array]]:
        """The probe and its multipliers after each number of steps, ascending."""
        cosines = features @ texts.T
        mean = features.mean(axis=0)
        centred = features - mean
        text_part = centred @ texts.T
        target = one_hot(labels, len(texts))
        # A step is 1 / (2 L), of the loss's mean over samples; a block that nothing depends on stays.
        weight_step = _inverse(np.linalg.eigvalsh(centred.T @ centred / len(features))[-1])
        multiplier_step = _inverse((text_part**2).mean(axis=0))
        weight = previous_weight = np.zeros_like(texts)
        temperature = fit_weights(cosines[None], labels, np.array([self._scale()]))[0]
        multipliers = previous_multipliers = np.full(len(texts), temperature)
        for step in range(1, stops[-1] + 1):
            momentum = (step - 1) / (step + 2)
            ahead = weight + momentum * (weight - previous_weight)
            ahead_multipliers = multipliers + momentum * (multipliers - previous_multipliers)
            error = softmax(centred @ ahead.T + text_part * ahead_multipliers, axis=1) - target
            previous_weight, previous_multipliers = weight, multipliers
            weight = ahead - weight_step * (error.T @ centred) / len(features)
            multipliers = ahead_multipliers - multiplier_step * (error * text_part).mean(axis=0)
            if step in stops:
                whole = weight + multipliers[:, None] * texts
                yield LinearForm(whole, -whole @ mean), multipliers


def _inverse(curvature: Array) -> Array:
    return np.where(curvature > np.finfo(np.float64).tiny, 1 / np.maximum(curvature, np.finfo(np.float64).tiny), 0.0)
