from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from fastfsl.errors import ConfigError, DataError, DeviceError, ShapeError
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.selection import StepSelection
from fastfsl.flow import euler, normalize


@pytest.fixture(scope="module")
def fitted(make_problem, quick):
    problem = make_problem(shots=8)
    return FlowMatchingAlignment(**quick).fit(problem.features, problem.labels, problem.class_embeddings), problem


def test_it_learns_what_zero_shot_does_not_know(fitted):
    estimator, problem = fitted
    zero_shot = (problem.test_features @ problem.class_embeddings.T).argmax(axis=1)
    assert (zero_shot == problem.test_labels).mean() < 0.6
    assert estimator.score(problem.test_features, problem.test_labels) > 0.95


def test_steps_are_chosen_on_folds_of_the_support(fitted):
    estimator, _ = fitted
    selection = estimator.selection_
    assert selection.rule == "folds"
    assert selection.num_folds == 2
    assert len(selection.accuracy_by_step) == 11
    assert selection.accuracy_by_step[selection.num_steps] == max(selection.accuracy_by_step)
    assert estimator.num_steps_ == selection.num_steps


def test_transport_is_the_euler_solution_of_its_field(fitted):
    estimator, problem = fitted
    x_0 = torch.from_numpy(problem.test_features)
    expected = normalize(euler(estimator.velocity_field_, x_0, estimator.num_steps_, 0.1))
    np.testing.assert_allclose(estimator.transport(problem.test_features), expected, atol=1e-5)


def test_read_outs_agree_with_each_other(fitted):
    estimator, problem = fitted
    logits = estimator.decision_function(problem.test_features)
    cosines = estimator.transport(problem.test_features) @ estimator.class_targets_.numpy().T
    np.testing.assert_allclose(logits, 100 * cosines, atol=1e-3)
    probabilities = estimator.predict_proba(problem.test_features)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == estimator.predict(problem.test_features)).all()


@pytest.mark.parametrize("length", [7.0, 1e-20, 1e30])
def test_length_of_the_input_does_not_matter(fitted, length):
    estimator, problem = fitted
    scaled = length * problem.test_features.astype(np.float64)
    np.testing.assert_allclose(estimator.transport(scaled), estimator.transport(problem.test_features), atol=1e-5)


def test_same_seed_same_model_other_seed_other_model(make_problem, quick, fitted):
    estimator, problem = fitted
    again = FlowMatchingAlignment(**quick).fit(problem.features, problem.labels, problem.class_embeddings)
    other = FlowMatchingAlignment(**quick, seed=1).fit(problem.features, problem.labels, problem.class_embeddings)
    np.testing.assert_array_equal(
        again.decision_function(problem.test_features), estimator.decision_function(problem.test_features)
    )
    assert np.abs(other.transport(problem.test_features) - estimator.transport(problem.test_features)).max() > 1e-3


def test_training_leaves_torchs_random_state_alone(make_problem, quick):
    problem = make_problem(shots=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    FlowMatchingAlignment(**quick).fit(problem.features, problem.labels, problem.class_embeddings)
    assert torch.equal(torch.rand(3), expected)


def test_given_steps_are_taken_without_selection(make_problem, quick):
    problem = make_problem(shots=2)
    estimator = FlowMatchingAlignment(**quick, num_steps=0).fit(
        problem.features, problem.labels, problem.class_embeddings
    )
    assert estimator.selection_ == StepSelection(num_steps=0, rule="fixed")
    np.testing.assert_allclose(estimator.transport(problem.test_features), problem.test_features, atol=1e-6)


@pytest.mark.parametrize("noise", ["bridge", "interpolant"])
def test_noise_augmentations_train(make_problem, quick, noise):
    problem = make_problem(shots=8)
    estimator = FlowMatchingAlignment(**quick, noise=noise, noise_scale=0.1, num_steps=7)
    estimator.fit(problem.features, problem.labels, problem.class_embeddings)
    assert estimator.score(problem.test_features, problem.test_labels) > 0.9


@pytest.mark.parametrize(
    "params", [{"noise": "bridge"}, {"noise": "interpolant", "noise_scale": 0.1}, {"times_per_batch": None}]
)
def test_options_of_the_recipe_reach_the_training(make_problem, params):
    problem = make_problem(shots=8)  # one batch of 32 with its 16 shared times
    quick: dict[str, Any] = {"num_blocks": 1, "epochs": 20, "num_steps": 5, "learning_rate": 3e-3}
    arrays = (problem.features, problem.labels, problem.class_embeddings)
    plain = FlowMatchingAlignment(**quick).fit(*arrays)
    other = FlowMatchingAlignment(**quick, **params).fit(*arrays)
    assert np.abs(other.transport(problem.features) - plain.transport(problem.features)).max() > 1e-3


def test_state_restores_the_estimator(fitted):
    estimator, problem = fitted
    restored = clone(estimator).restore(estimator.state(), estimator.selection_record())
    np.testing.assert_array_equal(
        restored.decision_function(problem.test_features), estimator.decision_function(problem.test_features)
    )


def test_state_of_another_architecture_is_refused(fitted):
    estimator, _ = fitted
    with pytest.raises(DataError, match="train it again"):
        clone(estimator).set_params(num_blocks=2).restore(estimator.state(), estimator.selection_record())


def test_stages_are_reported(make_problem, quick):
    problem = make_problem(shots=2)
    heard = []
    FlowMatchingAlignment(**quick).fit(
        problem.features, problem.labels, problem.class_embeddings, on_stage=lambda *stage: heard.append(stage)
    )
    assert {name for name, _, _ in heard} == {"fold 1/2", "fold 2/2", "training"}
    assert heard[-1] == ("training", 60, 60)


def _features(**changes):
    rng = np.random.default_rng(0)
    arguments = {
        "features": rng.normal(size=(8, 6)),
        "labels": np.array([0, 0, 0, 0, 1, 1, 1, 1]),
        "class_embeddings": rng.normal(size=(2, 6)),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"features": np.full((8, 6), np.nan)}, DataError, "NaN"),
        ({"features": np.zeros((8, 6))}, DataError, "zero vector in row 0"),
        ({"features": np.full((8, 6), 1e200)}, DataError, "larger than float32"),
        ({"features": [[1.0], [1.0, 2.0]]}, ShapeError, "array of numbers"),
        ({"features": np.zeros((0, 6))}, ShapeError, "non-empty"),
        ({"features": np.ones((8, 5))}, ShapeError, "5 and 6"),
        ({"features": np.ones(8)}, ShapeError, r"\(n, d\)"),
        ({"features": np.array([["a"] * 6] * 8)}, ShapeError, "numbers"),
        ({"labels": np.array([0, 0, 0, 0, 1, 1, 1, 2])}, DataError, r"0\.\.1"),
        ({"labels": np.array([0, 0, 0, 0, 1, 1, 1, -1])}, DataError, r"-1\.\.1"),
        ({"labels": np.zeros(7, dtype=int)}, ShapeError, r"\(8,\)"),
        ({"labels": np.full(8, 0.5)}, DataError, "integer"),
        ({"class_embeddings": np.array([[np.inf] * 6] * 2)}, DataError, "class_embeddings"),
        ({"plain_features": np.ones((7, 6))}, ShapeError, "plain"),
    ],
)
def test_bad_arrays_are_named(quick, changes, error, words):
    with pytest.raises(error, match=words):
        FlowMatchingAlignment(**quick).fit(**_features(**changes))


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"epochs": 0}, ConfigError, "epochs"),
        ({"num_blocks": 0}, ConfigError, "num_blocks"),
        ({"num_blocks": 99999}, ConfigError, "num_blocks"),
        ({"num_folds": 1}, ConfigError, "num_folds"),
        ({"learning_rate": -1.0}, ConfigError, "learning_rate"),
        ({"num_steps": 11}, ConfigError, "num_steps"),
        ({"max_steps": 0}, ConfigError, "max_steps"),
        ({"max_steps": 10**9}, ConfigError, "max_steps"),
        ({"noise": "gauss"}, ConfigError, "noise"),
        ({"device": "gpu"}, DeviceError, "gpu"),
    ],
)
def test_bad_parameters_are_named(params, error, words):
    with pytest.raises(error, match=words):
        FlowMatchingAlignment(**params).fit(**_features())


def test_a_score_needs_one_label_a_sample(fitted):
    estimator, problem = fitted
    with pytest.raises(ShapeError, match=r"labels \(100,\), one a sample, got \(100, 1\)"):
        estimator.score(problem.test_features, problem.test_labels[:, None])


def test_unfitted_says_so():
    with pytest.raises(ConfigError, match="fit first"):
        FlowMatchingAlignment().predict(np.ones((1, 6)))
