"""Kernel ridge regression with the zero-shot classifier as prior."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve
from scipy.linalg.lapack import dpotri

from fastfsl.errors import ConfigError
from fastfsl.heads.base import Head, check_grid
from fastfsl.heads.blending import Candidate, Selection, select
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.folds import Folds
from fastfsl.heads.form import KernelForm, LinearForm, sharpened
from fastfsl.heads.nearest_mean import one_hot
from fastfsl.heads.support import Array, Support

Solution = Literal["minimiser", "released"]

# Under the one-shot rule.
_ONE_SHOT = {"beta": 1.0, "ridge": 0.1}


class ProKeR(Head):
    """The function nearest to the zero-shot classifier, in the kernel's norm, that fits the support's labels.

    For the kernel k(x, x') = exp(-beta (1 - x·x')), support S (n, d), K = k(S, S), one-hot labels Y (n, C) and the
    zero-shot prior f(x) = x Tᵀ, the minimiser over g of Σ_i |g(x_i) - Y_i|² + ridge · |g - s f|², times b, is

        logits = a · f(x) + k(x, S) (K + ridge I)⁻¹ (b · Y - a · f(S)),   a = b s.

    The released code solves (K / ridge + I) α = b · Y - a · f(S) and adds k(x, S) α, without the 1/ridge that makes it
    the minimiser: its correction is ridge times this one, and the same at ridge 1. `solution` says which.

    beta and ridge by cross-validation over a grid, a and b as `blending` tells: the logits are linear in them. All
    folds of one (beta, ridge) come from one inverse: with B = (K + ridge I)⁻¹ the solution without the samples H is
    B Y - B[:, H] B[H, H]⁻¹ (B Y)[H].

    Args:
        betas: kernel widths to choose among.
        ridges: regularisations to choose among.
        solution: `minimiser`, the paper's, or `released`, its correction times the ridge.
        logit_scale: scale of the zero-shot cosines that a is drawn to; None means 100.
        num_folds: cross-validation folds at most.
        seed: seed of the folds.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Attributes:
        beta_: the chosen beta.
        ridge_: the chosen ridge.

    Source: ProKeR (arXiv 2501.11175); ridge is lambda there.
    """

    def __init__(
        self,
        *,
        betas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0),
        ridges: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        solution: Solution = "minimiser",
        logit_scale: float | None = None,
        num_folds: int = 4,
        seed: int = 0,
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.betas = betas
        self.ridges = ridges
        self.solution = solution
        self.logit_scale = logit_scale
        self.num_folds = num_folds
        self.seed = seed
        self.class_embeddings = class_embeddings

    def _fit(self, support: Support) -> tuple[KernelForm, Selection]:
        folds = self._folds(support)
        selection = select(self._candidates(support, folds), folds, self._scale())
        self.beta_, self.ridge_ = selection.settings["beta"], selection.settings["ridge"]
        a, b = selection.prior_weight, selection.score_weight
        gram = sharpened(support.features @ support.features.T, self.beta_)
        target = b * one_hot(support.labels, support.num_classes)
        target -= a * support.features @ support.class_embeddings.T
        values = self._factor(self.ridge_) * cho_solve(cho_factor(gram + self.ridge_ * np.eye(len(gram))), target)
        prior = LinearForm(a * support.class_embeddings, np.zeros(support.num_classes))
        return KernelForm(prior, support.features, values, self.beta_), selection

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does."""
        super().check_parameters()
        check_grid("betas", self.betas)
        check_grid("ridges", self.ridges)
        if self.solution not in ("minimiser", "released"):
            raise ConfigError(f"expected solution 'minimiser' or 'released', got {self.solution!r}")

    def _factor(self, ridge: float) -> float:
        """What the minimiser's correction is multiplied with."""
        return ridge if self.solution == "released" else 1.0

    def _candidates(self, support: Support, folds: Folds) -> Iterator[Candidate]:
        gram = support.features @ support.features.T
        rows = gram if support.plain is support.features else support.plain @ support.features.T
        prior = support.plain @ support.class_embeddings.T
        # Both systems, for the labels and for the prior, share the matrix.
        targets = np.hstack(
            [one_hot(support.labels, support.num_classes), support.features @ support.class_embeddings.T]
        )
        grid = [(beta, ridge) for beta in self.betas for ridge in self.ridges]
        if folds.rule == "one-shot":
            grid = [(_ONE_SHOT["beta"], _ONE_SHOT["ridge"])]
        for beta, ridge in grid:
            fitted = _held_out(sharpened(gram, beta), sharpened(rows, beta), targets, ridge, folds)
            fitted *= self._factor(ridge)
            labels_part, prior_part = np.hsplit(fitted, 2)
            yield Candidate({"beta": beta, "ridge": ridge}, labels_part, prior - prior_part)


def _held_out(gram: Array, rows: Array, targets: Array, ridge: float, folds: Folds) -> Array:
    """Kernel ridge predictions (n, ...) of `targets` for each sample from the solution without its fold."""
    factor, _ = cho_factor(gram + ridge * np.eye(len(gram)), lower=True)
    triangle, _ = dpotri(factor, lower=True)  # the inverse from its factor: a third of a solution with n right sides
    inverse = np.tril(triangle) + np.tril(triangle, -1).T
    solution = inverse @ targets
    predicted = np.zeros_like(targets)
    for _, held_out in folds:
        block = inverse[np.ix_(held_out, held_out)]
        without = solution - inverse[:, held_out] @ solve(block, solution[held_out], assume_a="pos")
        predicted[held_out] = rows[held_out] @ without
    return predicted
