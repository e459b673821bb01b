"""Each closed form against an independent evaluation of its equations."""

from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
from scipy.special import log_softmax

from fastfsl.errors import ConfigError
from fastfsl.heads import GDA, LinearForm, LinearProbe, NearestMean, ProKeR, TipAdapter, ZeroShot
from fastfsl.heads.blending import fit_weights
from fastfsl.heads.folds import make_folds
from fastfsl.heads.support import check_support


@pytest.fixture(params=[1, 6, [2, 9, 3, 5, 4]], ids=["one-shot", "balanced", "imbalanced"])
def problem(make_problem, request, to_unit):
    problem = make_problem(request.param)
    problem.x = to_unit(problem.features)
    problem.texts = to_unit(problem.class_embeddings)
    problem.queries = to_unit(problem.test_features)
    return problem


def test_zero_shot(problem):
    logits = ZeroShot(logit_scale=30.0).fit(*problem.arrays).decision_function(problem.queries)
    np.testing.assert_allclose(logits, 30 * problem.queries @ problem.texts.T, atol=1e-9)


def test_nearest_mean(problem, to_unit):
    estimator = NearestMean().fit(*problem.arrays)
    means = to_unit([problem.x[problem.labels == c].mean(axis=0) for c in range(5)])
    expected = estimator.selection_.score_weight * problem.queries @ means.T
    np.testing.assert_allclose(estimator.decision_function(problem.queries), expected, atol=1e-9)


def test_gda(problem):
    estimator = GDA().fit(*problem.arrays)
    n, d = problem.x.shape
    means = np.array([problem.x[problem.labels == c].mean(axis=0) for c in range(5)])
    centre = problem.x.mean(axis=0) if n == 5 else means[problem.labels]
    covariance = (problem.x - centre).T @ (problem.x - centre) / (n - 1)
    precision = (n - 1) * np.linalg.inv((n - 1) * covariance + np.trace(covariance) * np.eye(d))
    # -1/2 of the Mahalanobis distance, up to what all classes share
    away = problem.queries[:, None] - means
    odds = -0.5 * np.einsum("qcd,de,qce->qc", away, precision, away)
    a, b = estimator.selection_.prior_weight, estimator.selection_.score_weight
    expected = log_softmax(a * problem.queries @ problem.texts.T + b * odds, axis=1)
    found = log_softmax(estimator.decision_function(problem.queries), axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("counts", [1, 4])
def test_gda_takes_views_for_samples(make_problem, to_unit, counts):
    """Means and covariance are those of all views; at one shot the covariance within the classes is not zero."""
    problem = make_problem(counts, num_views=3)
    estimator = GDA().fit(*problem.arrays)
    x, labels = to_unit(problem.features.reshape(-1, problem.features.shape[2])), problem.labels.repeat(3)
    means = np.array([x[labels == c].mean(axis=0) for c in range(5)])
    scatter = (x - means[labels]).T @ (x - means[labels])
    assert np.trace(scatter) > 0.1
    precision = (len(x) - 1) * np.linalg.inv(scatter + np.trace(scatter) / (len(x) - 1) * np.eye(x.shape[1]))
    queries = to_unit(problem.test_features)
    away = queries[:, None] - means
    a, b = estimator.selection_.prior_weight, estimator.selection_.score_weight
    expected = a * queries @ to_unit(problem.class_embeddings).T - b / 2 * np.einsum(
        "qcd,de,qce->qc", away, precision, away
    )
    found = log_softmax(estimator.decision_function(queries), axis=1)
    np.testing.assert_allclose(found, log_softmax(expected, axis=1), atol=1e-6)

    of_means = GDA(views="mean").fit(*problem.arrays).decision_function(queries)
    at_one_shot = GDA(views="one-shot").fit(*problem.arrays).decision_function(queries)
    np.testing.assert_array_equal(at_one_shot, estimator.decision_function(queries) if counts == 1 else of_means)
    assert not np.allclose(of_means, estimator.decision_function(queries))
    with pytest.raises(ConfigError, match=r"views 'always', .* got 'all'"):
        GDA(views=cast("Any", "all")).fit(*problem.arrays)


@pytest.mark.parametrize("ridge", [0.03, 1.0, 3.0])
def test_prokers_released_correction_is_the_ridge_times_the_papers(problem, ridge):
    """(K / λ + I) α = Y - f without the 1/λ is λ times the minimiser's α."""
    paper = ProKeR(betas=(2.0,), ridges=(ridge,)).fit(*problem.arrays)
    if paper.selection_.rule == "one-shot":
        ridge = paper.ridge_
    with patch("fastfsl.heads.proker.select", return_value=paper.selection_):
        released = ProKeR(betas=(2.0,), ridges=(ridge,), solution="released").fit(*problem.arrays)
    prior = paper.selection_.prior_weight * problem.queries @ problem.texts.T
    ours, theirs = (estimator.decision_function(problem.queries) - prior for estimator in (paper, released))
    np.testing.assert_allclose(theirs, ridge * ours, rtol=1e-9, atol=1e-9)

    a, b = paper.selection_.prior_weight, paper.selection_.score_weight
    gram = np.exp(-paper.beta_ * (1 - problem.x @ problem.x.T))
    residual = b * np.eye(5)[problem.labels] - a * problem.x @ problem.texts.T
    alpha = np.linalg.solve(gram / ridge + np.eye(len(gram)), residual)
    np.testing.assert_allclose(theirs, np.exp(-paper.beta_ * (1 - problem.queries @ problem.x.T)) @ alpha, atol=1e-8)
    with pytest.raises(ConfigError, match="solution 'minimiser' or 'released'"):
        ProKeR(solution=cast("Any", "paper")).fit(*problem.arrays)


def test_proker(problem):
    estimator = ProKeR().fit(*problem.arrays)
    a, b = estimator.selection_.prior_weight, estimator.selection_.score_weight

    def kernel(x, y):
        return np.exp(-estimator.beta_ * (1 - x @ y.T))

    n = len(problem.labels)
    residual = b * np.eye(5)[problem.labels] - a * problem.x @ problem.texts.T
    solution = np.linalg.solve(kernel(problem.x, problem.x) + estimator.ridge_ * np.eye(n), residual)
    expected = a * problem.queries @ problem.texts.T + kernel(problem.queries, problem.x) @ solution
    np.testing.assert_allclose(estimator.decision_function(problem.queries), expected, rtol=1e-7, atol=1e-7)


def test_tip_adapter(problem):
    estimator = TipAdapter().fit(*problem.arrays)
    counts = np.bincount(problem.labels)
    expected = estimator.selection_.prior_weight * problem.queries @ problem.texts.T
    for row, x in enumerate(problem.queries):
        for key, label in zip(problem.x, problem.labels, strict=True):
            affinity = np.exp(-estimator.beta_ * (1 - float(x @ key)))
            expected[row, label] += estimator.alpha_ * affinity / counts[label]
    np.testing.assert_allclose(estimator.decision_function(problem.queries), expected, rtol=1e-9, atol=1e-9)


def test_linear_probe_is_where_the_gradient_vanishes(problem):
    estimator = LinearProbe(Cs=(10.0,)).fit(*problem.arrays)
    assert isinstance(estimator.form_, LinearForm)
    weight = estimator.form_.weight / estimator.selection_.score_weight
    bias = estimator.form_.bias / estimator.selection_.score_weight
    error = np.exp(log_softmax(problem.x @ weight.T + bias, axis=1)) - np.eye(5)[problem.labels]
    n = len(problem.labels)
    np.testing.assert_allclose((10.0 * error.T @ problem.x + weight) / (10.0 * n), 0, atol=2e-3)
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=2e-3)


@pytest.mark.parametrize(
    ("head", "options"),
    [(GDA, {}), (ProKeR, {}), (ProKeR, {"solution": "released"}), (TipAdapter, {}), (NearestMean, {})],
)
def test_held_out_figures_are_those_of_heads_fitted_without_the_fold(make_problem, head, options):
    problem = make_problem([4, 9, 3, 5, 1])
    params = {"betas": (2.0,), "ridges": (0.3,), **options}
    estimator = head(**{k: v for k, v in params.items() if k in head().get_params()}).fit(*problem.arrays)
    support = check_support(problem.features, problem.labels, problem.class_embeddings, None)
    chosen = estimator.selection_
    likelihood, right = [], []
    for train, held_out in make_folds(support, estimator.num_folds, estimator.seed):
        part = estimator.__class__(**estimator.get_params())
        x, y = support.features[train], support.labels[train]
        # The same weights on a head that never saw the fold.
        logits = _logits_with(part, chosen, x, y, support.class_embeddings, support.features[held_out])
        likelihood.extend(log_softmax(logits, axis=1)[np.arange(len(held_out)), support.labels[held_out]])
        right.extend(logits.argmax(axis=1) == support.labels[held_out])
    assert chosen.num_folds == 4
    assert len(right) == 21  # the only sample of a class is not held out
    assert chosen.log_likelihood == pytest.approx(np.mean(likelihood), abs=1e-9)
    assert chosen.accuracy == pytest.approx(np.mean(right))


def _logits_with(head, chosen, x, y, texts, queries):
    with patch(f"{type(head).__module__}.select", return_value=chosen):
        return head.fit(x, y, texts).decision_function(queries)


def test_weights_maximise_the_penalised_likelihood():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=60)
    parts = rng.normal(size=(2, 60, 4)) + np.array([1.0, 0.3])[:, None, None] * np.eye(4)[labels]
    centre = np.array([3.0, 0.5])

    def objective(w):
        fit = log_softmax(np.tensordot(w, parts, axes=1), axis=1)[np.arange(60), labels].sum()
        return fit - 0.5 * ((w / centre - 1) ** 2).sum()

    weights = fit_weights(parts, labels, centre)
    assert (weights > 0).all()
    for step in ([1e-2, 0], [-1e-2, 0], [0, 1e-2], [0, -1e-2]):
        assert objective(weights) > objective(weights + step)
    misleading = fit_weights(np.stack([parts[0], -3 * np.eye(4)[labels]]), labels, centre)
    assert misleading[1] == 0  # never negative


@pytest.mark.parametrize("counts", [2, 3, 16, [1, 2, 30, 5, 4]])
def test_folds_are_stratified(make_problem, counts):
    problem = make_problem(counts)
    support = check_support(problem.features, problem.labels, problem.class_embeddings, None)
    folds = make_folds(support, 4, seed=0)
    assert folds.rule == "folds"
    assert folds.seen().all()
    sizes = np.bincount(support.labels)
    for label, size in enumerate(sizes):
        held = np.bincount(folds.fold_of[(support.labels == label) & (folds.fold_of >= 0)], minlength=len(folds))
        assert held.max() - held.min() <= 1
        assert held.sum() == (size if size > 1 else 0)
    assert (make_folds(support, 4, seed=1).fold_of != folds.fold_of).any()
