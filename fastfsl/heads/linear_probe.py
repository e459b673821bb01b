"""Linear probe: multinomial logistic regression on the frozen features."""

import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from fastfsl.heads.base import Head, check_grid
from fastfsl.heads.blending import Candidate, Selection, select
from fastfsl.heads.classes import ClassEmbeddings
from fastfsl.heads.folds import Folds
from fastfsl.heads.form import LinearForm
from fastfsl.heads.support import Array, Labels, Support

# Under the one-shot rule.
_ONE_SHOT_C = 10.0

# On the gradient of the mean loss; what is left does not show in the third digit of a held-out accuracy.
_TOLERANCE = 1e-4
_MAX_ITERATIONS = 300


class LinearProbe(Head):
    """logits = b · (x Wᵀ + β), W and β the minimisers of C · cross-entropy + ½ |W|²; text is not used.

    C by cross-validation over a grid, b (a temperature) as `blending` tells. The features are centred before the
    optimisation, which changes nothing but its condition number since β is not penalised; along the grid each solution
    starts from the one before.

    Args:
        Cs: inverse regularisations to choose among, as scikit-learn has them (the loss is a sum over samples).
        num_folds: cross-validation folds at most.
        seed: seed of the folds.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Attributes:
        C_: the chosen C.

    Source: CLIP (arXiv 2103.00020), its evaluation of features: L-BFGS.
    """

    def __init__(
        self,
        *,
        Cs: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0, 300.0),
        num_folds: int = 4,
        seed: int = 0,
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.Cs = Cs
        self.num_folds = num_folds
        self.seed = seed
        self.class_embeddings = class_embeddings

    def _fit(self, support: Support) -> tuple[LinearForm, Selection]:
        folds = self._folds(support)
        selection = select(self._candidates(support, folds), folds, self._scale())
        self.C_ = selection.settings["C"]
        (probe,) = _probes(support.features, support.labels, support.num_classes, (self.C_,))
        return LinearForm(selection.score_weight * probe.weight, selection.score_weight * probe.bias), selection

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does."""
        super().check_parameters()
        check_grid("Cs", self.Cs)

    def _candidates(self, support: Support, folds: Folds) -> Iterator[Candidate]:
        grid = tuple(sorted(self.Cs)) if folds.rule == "folds" else (_ONE_SHOT_C,)
        scores = np.zeros((len(grid), len(support.labels), support.num_classes))
        for train, held_out in folds:
            probes = _probes(support.features[train], support.labels[train], support.num_classes, grid)
            for position, probe in enumerate(probes):
                scores[position, held_out] = probe.apply(support.plain[held_out])
        for C, held_out_scores in zip(grid, scores, strict=True):
            yield Candidate({"C": C}, held_out_scores)


def _probes(features: Array, labels: Labels, num_classes: int, grid: tuple[float, ...]) -> Iterator[LinearForm]:
    """The probe for each C of an ascending grid; a class without samples keeps zeros."""
    present = np.unique(labels)
    mean = features.mean(axis=0)
    centred = features - mean
    model = LogisticRegression(tol=_TOLERANCE, max_iter=_MAX_ITERATIONS, warm_start=True)
    for C in grid:
        weight, bias = np.zeros((num_classes, features.shape[1])), np.zeros(num_classes)
        if len(present) > 1:
            with warnings.catch_warnings():
                # What separates the samples at a large C has no end; the iterations so far are a fine classifier.
                warnings.simplefilter("ignore", ConvergenceWarning)
                warnings.filterwarnings("ignore", message="The number of unique classes", category=UserWarning)
                model.set_params(C=C).fit(centred, labels)
            if len(present) == 2:  # scikit-learn keeps one row, the log-odds of the second class
                weight[present] = np.vstack([-0.5, 0.5]) * model.coef_
                bias[present] = np.array([-0.5, 0.5]) * model.intercept_
            else:
                weight[present], bias[present] = model.coef_, model.intercept_
        yield LinearForm(weight, bias - weight @ mean)
