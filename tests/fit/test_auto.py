import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from fastfsl.errors import ConfigError, DataError
from fastfsl.fit import auto as auto_module
from fastfsl.fit.auto import Auto, _temperature, _threshold
from fastfsl.fit.deployment import deployment
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.flow import class_logits, plan_states


@pytest.fixture(autouse=True)
def short_flow(monkeypatch):
    """Flows that train in a moment."""
    defaults = FlowMatchingAlignment.__init__.__kwdefaults__
    for name, value in {"num_blocks": 1, "updates": 20, "batch_size": 16, "learning_rate": 3e-3}.items():
        monkeypatch.setitem(defaults, name, value)


def fit(problem, on_stage=None, **params):
    return Auto(**params).fit(problem.features, problem.labels, problem.class_embeddings, on_stage=on_stage)


def test_it_is_as_good_as_its_components_and_calibrated(make_problem):
    problem = make_problem(shots=8)
    estimator = fit(problem)
    selection = estimator.selection_
    assert selection.rule == "folds"
    assert set(selection.weights) <= {"gda", "proker", "lp++", "fma"}
    assert estimator.score(problem.test_features, problem.test_labels) > 0.95
    assert 0.7 < selection.temperature < 2
    best = estimator.predict_proba(problem.test_features).max(axis=1)
    assert best.mean() > 0.8


def test_logits_are_the_weighted_sum_over_the_temperature(make_problem):
    problem = make_problem(shots=6)
    estimator = fit(problem)
    selection = estimator.selection_
    expected = sum(
        weight * estimator.components_[name].decision_function(problem.test_features).astype(np.float64)
        for name, weight in selection.weights.items()
    )
    found = estimator.decision_function(problem.test_features)
    np.testing.assert_allclose(found, expected / selection.temperature, atol=1e-9)
    np.testing.assert_allclose(estimator.predict_proba(problem.test_features), softmax(found, axis=1), atol=1e-9)


def test_a_component_that_knows_nothing_gets_little_weight(make_problem):
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 200)
    good = 2.0 * np.eye(4)[labels] + generator.normal(size=(800, 4))
    noise = generator.normal(size=(800, 4))
    weights = auto_module._share(np.stack([good, noise]), labels)
    assert weights[1] < 0.1 * weights[0]
    few = auto_module._share(np.stack([good[::100], noise[::100]]), labels[::100])
    assert few[1] / few[0] > weights[1] / weights[0]  # eight samples cannot tell as much


def test_one_shot_follows_the_rule_and_refuses_a_threshold(make_problem):
    problem = make_problem(shots=1)
    estimator = fit(problem)
    assert estimator.selection_.rule == "one-shot"
    assert set(estimator.components_) == set(estimator.selection_.weights) == set(auto_module.ONE_SHOT_SHARES)
    heard = []
    with pytest.raises(DataError, match="leave target_precision out"):
        fit(problem, target_precision=0.9, on_stage=lambda name, *_: heard.append(name))
    assert "training" not in heard  # the flow's
    heads_only = fit(problem, components=("gda", "proker"))
    assert set(heads_only.selection_.weights) == {"gda", "proker"}


def test_at_one_shot_the_logits_of_all_are_as_large_as_the_flows(make_problem):
    problem = make_problem(shots=1)
    estimator = fit(problem)
    weights, shares = estimator.selection_.weights, auto_module.ONE_SHOT_SHARES
    features, labels = problem.features / np.linalg.norm(problem.features, axis=1, keepdims=True), problem.labels
    spread = {}
    for name in weights:
        wrong = weights[name] * estimator.components_[name].logits(features).astype(np.float64)
        wrong = wrong[~np.eye(wrong.shape[1], dtype=bool)[labels]].reshape(len(labels), -1)
        spread[name] = np.sqrt(wrong.var(axis=1, ddof=1).mean()) / shares[name]
    assert spread["fma"] == pytest.approx(spread["lp++"], rel=1e-3)
    assert weights["fma"] == pytest.approx(shares["fma"])


@pytest.mark.parametrize("shots", [1, 5])
def test_state_and_record_restore_it(make_problem, shots):
    problem = make_problem(shots=shots)
    estimator = fit(problem)
    record = json.loads(json.dumps(estimator.selection_record()))
    restored = Auto().restore(estimator.state(), record)
    np.testing.assert_array_equal(
        restored.decision_function(problem.test_features), estimator.decision_function(problem.test_features)
    )
    assert repr(restored.selection_) == repr(estimator.selection_)
    assert restored.num_parameters_ == estimator.num_parameters_
    with pytest.raises(DataError, match="train it again"):
        Auto(components=("gda",)).restore(estimator.state(), record)


def test_the_order_of_the_samples_does_not_mix_up_what_was_held_out(make_problem):
    problem = make_problem(shots=6)
    plain = fit(problem, components=("gda", "fma"))
    shuffled = np.random.default_rng(1).permutation(len(problem.labels))
    other = Auto(components=("gda", "fma")).fit(
        problem.features[shuffled], problem.labels[shuffled], problem.class_embeddings
    )
    assert other.selection_.accuracy == pytest.approx(plain.selection_.accuracy, abs=0.15)
    assert other.selection_.accuracy > 0.7  # rows of different samples added up would be near chance


def test_its_deployment_computes_its_logits(make_problem):
    problem = make_problem(shots=6)
    estimator = fit(problem, target_precision=0.9)
    parts = deployment(estimator)
    x = problem.test_features.astype(np.float64)
    total = sum(form.apply(x) for form in parts.forms)
    assert (parts.plan is not None) == ("fma" in estimator.selection_.weights)
    if parts.plan is not None and parts.class_embeddings is not None:
        states = plan_states(parts.plan, torch.from_numpy(problem.test_features), parts.read_steps)
        flow = class_logits(states[-1], torch.from_numpy(parts.class_embeddings), parts.logit_scale)
        total = total + parts.flow_weight * flow.double().numpy()
    np.testing.assert_allclose(total / parts.temperature, estimator.decision_function(problem.test_features), atol=1e-3)
    assert parts.threshold == estimator.selection_.threshold


def test_the_threshold_is_the_lowest_that_reaches_the_precision():
    best = np.array([0.9, 0.8, 0.7, 0.7, 0.6, 0.5])
    is_right = np.array([True, True, True, False, True, False])
    assert _threshold(best, is_right, 0.8) == 0.6  # 4 of 5
    assert _threshold(best, is_right, 0.75) == 0.6
    assert _threshold(best, is_right, 0.9) == 0.8  # the two at 0.7 stand or fall together
    with pytest.warns(UserWarning, match=r"the chosen one reaches 0\.500"):
        assert _threshold(np.array([0.9, 0.9]), np.array([True, False]), 0.9) == 0.9


def test_the_temperature_mends_logits_of_any_size_and_errs_on_the_modest_side():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 500)
    logits = 2.0 * np.eye(4)[labels] + generator.normal(size=(2000, 4))
    likeliest = 1.0 / minimize_scalar(lambda s: -log_softmax(s * logits, axis=1)[np.arange(2000), labels].sum()).x
    found = _temperature(logits, labels)
    assert likeliest < found < 1.15 * likeliest
    assert _temperature(7.0 * logits, labels) == pytest.approx(7.0 * found, rel=0.02)
    few = _temperature(logits[::50], labels[::50])
    assert few > found  # forty samples tell less


def test_logits_that_are_wrong_more_often_than_by_chance_have_a_temperature_all_the_same():
    labels = np.arange(6) % 3
    assert 100 < _temperature(-20.0 * np.eye(3)[labels], labels) < np.inf


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"components": ()}, "each once"),
        ({"components": ("gda", "gda")}, "each once"),
        ({"components": ("magic",)}, "unknown component 'magic'"),
        ({"target_precision": 1.5}, "between 0 and 1"),
        ({"logit_scale": -1.0}, "positive logit_scale"),
    ],
)
def test_parameters_out_of_range(make_problem, params, message):
    with pytest.raises(ConfigError, match=message):
        fit(make_problem(shots=2), **params)


def test_it_must_be_fitted_first(make_problem):
    with pytest.raises(ConfigError, match="call fit first"):
        Auto().predict(make_problem(shots=1).test_features)
