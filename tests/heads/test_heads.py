"""What holds for every head."""

import json

import numpy as np
import pytest
from sklearn.base import clone

import fastfsl.heads
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.heads import Head, LinearForm

ALL = [
    head
    for name in fastfsl.heads.__all__
    if isinstance(head := getattr(fastfsl.heads, name), type) and issubclass(head, Head) and head is not Head
]
FITTED = [head for head in ALL if head.__name__ != "ZeroShot"]


@pytest.mark.parametrize("head", FITTED)
@pytest.mark.parametrize("counts", [1, 2, 8, [1, 9, 2, 30, 3], [1, 1, 1, 5, 1]])
def test_it_knows_more_than_chance_whatever_the_class_sizes(make_problem, head, counts):
    problem = make_problem(counts)
    estimator = head().fit(*problem.arrays)
    assert estimator.score(problem.test_features, problem.test_labels) > (0.55 if np.max(counts) < 8 else 0.7)
    assert estimator.selection_.rule == ("folds" if np.mean(np.broadcast_to(counts, 5) > 1) >= 0.5 else "one-shot")
    assert np.isfinite(estimator.predict_proba(problem.test_features)).all()


@pytest.mark.parametrize("head", ALL)
@pytest.mark.parametrize("counts", [1, 6])
def test_logits_are_those_of_the_form_written_out(make_problem, to_unit, head, counts):
    problem = make_problem(counts)
    estimator = head().fit(*problem.arrays)
    x = to_unit(problem.test_features)
    form = estimator.form_
    linear = form if isinstance(form, LinearForm) else form.linear
    expected = np.array([[row @ w + b for w, b in zip(linear.weight, linear.bias, strict=True)] for row in x])
    if form is not linear:
        for key, value in zip(form.keys, form.values, strict=True):
            expected += np.exp(-form.beta * (1 - x @ key))[:, None] * value
    np.testing.assert_allclose(estimator.decision_function(problem.test_features), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(estimator.decision_function(7 * x), expected, rtol=1e-9, atol=1e-9)
    probabilities = np.exp(expected - expected.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(estimator.predict_proba(problem.test_features), probabilities, atol=1e-9)
    assert (estimator.predict(problem.test_features) == expected.argmax(axis=1)).all()
    assert form.apply(x).dtype == np.float64


@pytest.mark.parametrize("head", ALL)
@pytest.mark.parametrize("counts", [1, 6])
def test_order_of_samples_changes_nothing(make_problem, head, counts):
    problem = make_problem(counts)
    order = np.random.default_rng(1).permutation(len(problem.labels))
    one = head().fit(*problem.arrays)
    other = head().fit(problem.features[order], problem.labels[order], problem.class_embeddings)
    np.testing.assert_array_equal(
        one.decision_function(problem.test_features), other.decision_function(problem.test_features)
    )
    assert repr(one.selection_) == repr(other.selection_)


@pytest.mark.parametrize("head", ALL)
def test_fitting_again_gives_the_same(make_problem, head):
    problem = make_problem(6)
    estimator = head(seed=3) if "seed" in head().get_params() else head()
    one = estimator.fit(*problem.arrays).decision_function(problem.test_features)
    np.random.default_rng().random()
    two = clone(estimator).fit(*problem.arrays).decision_function(problem.test_features)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("head", FITTED)
def test_support_vector_of_several_views_is_their_renormalised_mean(make_problem, to_unit, head):
    problem = make_problem(4, num_views=3)
    views = problem.features * np.array([1.0, 5.0, 0.2])[:, None]  # lengths do not matter
    means = to_unit(to_unit(views).mean(axis=1))
    options = {"views": "mean"} if "views" in head().get_params() else {}  # GDA takes views for samples by default
    one = head(**options).fit(views, problem.labels, problem.class_embeddings)
    other = head(**options).fit(means, problem.labels, problem.class_embeddings)
    np.testing.assert_allclose(
        one.decision_function(problem.test_features), other.decision_function(problem.test_features), atol=1e-6
    )


@pytest.mark.parametrize("head", FITTED)
def test_held_out_samples_are_judged_by_their_plain_features(make_problem, head):
    problem = make_problem(8)
    easy = head().fit(*problem.arrays)
    swapped = problem.class_embeddings[(problem.labels + 1) % 5]
    hard = head().fit(*problem.arrays, plain_features=swapped)
    assert hard.selection_.log_likelihood < easy.selection_.log_likelihood
    assert hard.selection_.accuracy < easy.selection_.accuracy


@pytest.mark.parametrize("head", ALL)
def test_one_class_and_extreme_lengths_and_equal_samples(make_problem, head):
    problem = make_problem(6)
    alone = head().fit(problem.features[:3], np.zeros(3, dtype=int), problem.class_embeddings[:1])
    assert (alone.predict(problem.test_features) == 0).all()
    scaled = head().fit(problem.features * 2.0**-99, problem.labels, problem.class_embeddings * 2.0**99)
    plain = head().fit(*problem.arrays)
    np.testing.assert_array_equal(
        scaled.decision_function(problem.test_features), plain.decision_function(problem.test_features)
    )
    copies = head().fit(problem.class_embeddings[problem.labels], problem.labels, problem.class_embeddings)
    assert copies.score(problem.class_embeddings, np.arange(5)) == 1
    point = head().fit(np.ones_like(problem.features), problem.labels, problem.class_embeddings)
    assert np.isfinite(point.decision_function(problem.test_features)).all()


@pytest.mark.parametrize("head", [ALL[0], ALL[-1]])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": [[1.0], [2.0, 3.0]]}, ShapeError, "array of numbers"),
        ({"features": np.ones(12)}, ShapeError, r"\(n, d\) or \(n, V, d\), got \(12,\)"),
        ({"features": np.full((30, 12), "a")}, ShapeError, "array of numbers"),
        ({"features": np.ones((30, 11))}, ShapeError, "same CLIP model"),
        ({"features": np.zeros((30, 12))}, DataError, "zero vector in row 0"),
        ({"features": np.full((30, 12), np.nan)}, DataError, "row 0.*remove or repair"),
        ({"labels": np.zeros(29, dtype=int)}, ShapeError, r"labels \(30,\)"),
        ({"labels": np.full(30, 0.5)}, DataError, "integer labels"),
        ({"labels": np.arange(30)}, DataError, r"labels in 0\.\.4"),
        ({"labels": np.arange(30) % 4}, DataError, "sample of every class, got none of 4"),
        ({"class_embeddings": np.ones((5, 2, 12))}, ShapeError, r"class_embeddings \(rows, d\)"),
        ({"plain_features": np.ones((29, 12))}, ShapeError, r"plain_features \(30, 12\)"),
    ],
)
def test_bad_arrays_are_refused(make_problem, head, change, error, message):
    problem = make_problem(6)
    arrays = {"features": problem.features, "labels": problem.labels, "class_embeddings": problem.class_embeddings}
    with pytest.raises(error, match=message):
        head().fit(**(arrays | change))


@pytest.mark.parametrize("head", ALL)
def test_prediction_checks_its_features(make_problem, head):
    problem = make_problem(2)
    with pytest.raises(ConfigError, match="call fit first"):
        head().predict(problem.test_features)
    estimator = head().fit(*problem.arrays)
    with pytest.raises(ShapeError, match="width 12, got 5"):
        estimator.predict(problem.test_features[:, :5])
    with pytest.raises(DataError, match="labels in"):
        estimator.score(problem.test_features, problem.test_labels + 1)


@pytest.mark.parametrize("head", ALL)
def test_bad_parameters_are_refused(make_problem, head):
    bad = {"logit_scale": -1.0, "num_folds": 1, "betas": (), "ridges": (0.0,), "Cs": (float("nan"),)}
    bad |= {"epochs": 0, "learning_rate": 0.0, "batch_size": 0, "iterations": ()}
    problem = make_problem(2)
    for name in bad.keys() & head().get_params().keys():
        with pytest.raises(ConfigError, match=name):
            head(**{name: bad[name]}).fit(*problem.arrays)


@pytest.mark.parametrize("head", ALL)
@pytest.mark.parametrize("counts", [1, 6])
def test_state_and_record_restore_a_head(head, counts, make_problem):
    problem = make_problem(counts)
    fitted = head().fit(*problem.arrays)
    record = json.loads(json.dumps(fitted.selection_record()))
    restored = head().restore(fitted.state(), record)
    assert np.array_equal(restored.decision_function(problem.features), fitted.decision_function(problem.features))
    assert repr(restored.selection_) == repr(fitted.selection_)
    assert restored.num_parameters_ == fitted.num_parameters_ > 0
    with pytest.raises(DataError, match="train it again"):
        head().restore({**fitted.state(), "bias": np.zeros(2)}, record)
    with pytest.raises(DataError, match="train it again"):
        head().restore(fitted.state(), {"rule": "folds", "nonsense": 1})
