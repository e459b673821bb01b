"""How much weight the zero-shot prior and what was learned get: by likelihood on held-out support.

Every head's logits are a weighted sum, a · prior + b · scores. Given both for samples that were held out, the weights
are a logistic regression with two unknowns: convex, so that no grid over them is needed, and their common size is the
temperature, so that the probabilities come out calibrated.

Settings inside the scores (a kernel's width, a ridge) are compared by held-out accuracy, and by likelihood where
accuracy does not clearly tell them apart, as it cannot at few shots. Not by likelihood alone: least-squares scores
smoothed beyond what classifies best are never confidently wrong, and win.

A weak prior keeps the weights finite where the held-out samples can be separated, and is all there is where nothing
can be held out. It is the one-shot rule, the same for every head:

- the prior's weight is its best temperature on the support: no label of it went into the prior, so that every sample
  counts as held out. A prior that knows little of these images gets little weight;
- the scores get the weight that makes the scores of wrong classes scatter with standard deviation `WRONG_CLASS_SPREAD`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from fastfsl.heads.folds import Folds
from fastfsl.heads.support import Array, Labels

# Natural-logarithm units. Chosen on samples of 16-shot supports that single-shot episodes had left over.
WRONG_CLASS_SPREAD = 1.5

# Settings are as accurate as the best ones when their accuracies, paired by sample, differ by no more than this.
STANDARD_ERRORS = 0.5


@dataclass(frozen=True)
class Candidate:
    """What a head gives for one choice of its settings, each sample's row from the fold that held it out.

    Attributes:
        settings: the settings by name.
        scores: what was learned, (n, C).
        prior: the zero-shot logits as this head uses them, (n, C); None: the head uses none.
    """

    settings: dict[str, float]
    scores: Array
    prior: Array | None = None


@dataclass(frozen=True)
class Selection:
    """The chosen settings and weights, and the evidence for them.

    Attributes:
        rule: `folds` (cross-validation on the support), `one-shot` (the rule for where nothing can be held out) or
            `fixed` (there is nothing to choose).
        settings: the head's own settings.
        prior_weight: a; 0 where the head uses no prior.
        score_weight: b.
        num_folds: folds that the figures are pooled over; 0 for the other rules.
        log_likelihood: mean held-out log-probability of the right class, nats; NaN for the other rules.
        accuracy: held-out accuracy, fraction; NaN for the other rules.
        held_out: logits of each sample from the fold that held it out, (n, C), NaN rows for samples that never were;
            None for the other rules.
    """

    rule: Literal["folds", "one-shot", "fixed"]
    settings: dict[str, float] = field(default_factory=dict)
    prior_weight: float = 0.0
    score_weight: float = 0.0
    num_folds: int = 0
    log_likelihood: float = float("nan")
    accuracy: float = float("nan")
    held_out: Array | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The selection as JSON values: NaN as None, without the logits."""
        values = {name: value for name, value in vars(self).items() if name != "held_out"}
        return {name: None if value != value else value for name, value in values.items()}  # noqa: PLR0124  # NaN

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The selection of a `record`.

        Raises:
            TypeError: it has other entries.
        """
        values: dict[str, Any] = {name: float("nan") if value is None else value for name, value in record.items()}
        return cls(**values)


def select(candidates: Iterable[Candidate], folds: Folds, logit_scale: float) -> Selection:
    """The best candidate with its weights.

    Args:
        candidates: one for each choice of settings; under the one-shot rule the first is taken.
        folds: what their rows were held out by.
        logit_scale: what a weak prior draws the prior's weight to.
    """
    found: list[Selection] = []
    right: list[NDArray[np.bool_]] = []
    rows = folds.held_out
    labels = folds.labels[rows]
    seen = folds.seen()[rows]
    for candidate in candidates:
        scores = candidate.scores[rows]
        centre = [WRONG_CLASS_SPREAD / wrong_class_spread(scores, labels, seen)]
        parts = [scores]
        if candidate.prior is not None:
            prior = candidate.prior[rows]
            centre.append(float(fit_weights(prior[None], labels, np.array([logit_scale]))[0]))
            parts.append(prior)
        if folds.rule == "one-shot":
            return Selection("one-shot", candidate.settings, *_prior_first(centre))
        weights = fit_weights(np.stack(parts), labels, np.array(centre))
        logits = np.tensordot(weights, np.stack(parts), axes=1)
        held_out = np.full_like(candidate.scores, np.nan)
        held_out[rows] = logits
        right.append(logits.argmax(axis=1) == labels)
        found.append(
            Selection(
                "folds",
                candidate.settings,
                *_prior_first(weights.tolist()),
                num_folds=len(folds),
                log_likelihood=float((logits[np.arange(len(labels)), labels] - logsumexp(logits, axis=1)).mean()),
                accuracy=float(right[-1].mean()),
                held_out=held_out,
            )
        )
    return found[_best(np.array([selection.log_likelihood for selection in found]), np.array(right))]


def fit_weights(parts: Array, labels: Labels, centre: Array) -> Array:
    """Non-negative w that maximise Σ_i log softmax(Σ_j w_j parts_j)[i, labels_i] - ½ Σ_j (w_j / centre_j - 1)².

    Args:
        parts: logits to be weighted, (J, n, C).
        labels: class indices, (n,).
        centre: where the weak prior (of about one sample's worth) draws the weights to, (J,), positive.

    Returns:
        w, (J,).
    """
    scaled = parts * centre[:, None, None]
    right = scaled[:, np.arange(len(labels)), labels]

    def objective(relative: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = np.tensordot(relative, scaled, axes=1)
        total = logsumexp(logits, axis=1, keepdims=True)
        expected = np.tensordot(scaled, np.exp(logits - total), axes=([1, 2], [0, 1]))
        value = (total[:, 0] - relative @ right).sum() + 0.5 * ((relative - 1) ** 2).sum()
        return float(value), expected - right.sum(axis=1) + (relative - 1)

    found = minimize(objective, np.ones(len(centre)), jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(centre))
    weights: Array = found.x * centre
    return weights


def wrong_class_spread(scores: Array, labels: Labels, seen: NDArray[np.bool_]) -> float:
    """Standard deviation of the scores of wrong classes about their mean in the row; 1 where there is none.

    Args:
        scores: of samples, (n, C).
        labels: their class indices, (n,).
        seen: which classes count in which row, (n, C).
    """
    wrong = seen.copy()
    wrong[np.arange(len(labels)), labels] = False
    number = wrong.sum(axis=1, keepdims=True)
    mean = np.where(wrong, scores, 0).sum(axis=1, keepdims=True) / np.maximum(number, 1)
    squares = np.where(wrong, scores - mean, 0) ** 2
    freedom = np.maximum(number - 1, 0).sum()
    spread = float(np.sqrt(squares.sum() / freedom)) if freedom else 0.0
    return spread if spread > np.finfo(np.float64).tiny else 1.0


def _prior_first(weights: list[float]) -> tuple[float, float]:
    return (weights[1] if len(weights) == 2 else 0.0), weights[0]


def _best(log_likelihood: Array, right: NDArray[np.bool_]) -> int:
    """Of the candidates whose accuracy is not clearly below the best one's the likeliest; the first among equals.

    Args:
        log_likelihood: held out, (candidates,).
        right: whether each held-out sample is classified right, (candidates, n).
    """
    top = int(right.sum(axis=1).argmax())
    difference = right[top].astype(np.int64) - right.astype(np.int64)
    error = difference.std(axis=1) / np.sqrt(right.shape[1])
    close = difference.mean(axis=1) <= STANDARD_ERRORS * error
    return int(np.where(close, log_likelihood, -np.inf).argmax())
