"""What the options of a flow do to what is fitted, predicted and deployed."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from fastfsl.devices import has_fast_bf16
from fastfsl.errors import ConfigError
from fastfsl.fit import flow_training
from fastfsl.fit.deployment import deployment
from fastfsl.fit.flow_training import FlowRecipe
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.flow import blended_targets, class_logits, normalize, plan_states, solve

BRIEF: dict[str, Any] = {"num_blocks": 1, "updates": 15, "batch_size": 16, "learning_rate": 1e-2, "num_steps": 4}


@pytest.fixture(scope="module")
def problem(make_problem):
    return make_problem(shots=8)


@pytest.fixture(scope="module")
def fit(problem):
    def run(**params):
        return FlowMatchingAlignment(**{**BRIEF, **params}).fit(
            problem.features, problem.labels, problem.class_embeddings
        )

    return run


@pytest.fixture(scope="module")
def plain(fit):
    return fit()


def tensors(problem):
    return [torch.from_numpy(array) for array in (problem.features, problem.labels, problem.class_embeddings)]


@pytest.mark.parametrize("text_samples", [0.0, 2.0, float("inf")])
def test_targets_are_those_of_so_many_text_samples(fit, problem, text_samples):
    estimator = fit(text_samples=text_samples)
    features, labels, texts = tensors(problem)
    expected = blended_targets(features, labels, texts, text_samples)
    np.testing.assert_allclose(estimator.class_targets_, expected, atol=1e-6)
    assert (expected - texts).abs().max() > 0.1
    logits = class_logits(
        torch.from_numpy(estimator.transport(problem.test_features)), expected, estimator.logit_scale_
    )
    np.testing.assert_allclose(estimator.decision_function(problem.test_features), logits, atol=1e-3)


def _scaled(make_problem, shots, texts=None, **params):
    """A flow on images and texts that are right for the most part, and the logits of labels that they never saw."""
    problem = make_problem(shots=shots)
    noise = np.random.default_rng(3).normal(size=(2, *problem.features.shape)).astype(np.float32)
    problem.features += 0.3 * noise[0]
    problem.features /= np.linalg.norm(problem.features, axis=1, keepdims=True)
    features, labels = torch.from_numpy(problem.features), torch.from_numpy(problem.labels)
    if texts is None:
        texts = normalize(torch.stack([features[labels == label].mean(0) for label in range(4)])).numpy()
        texts = texts + 0.3 * noise[1, ::shots]
    estimator = FlowMatchingAlignment(**{**BRIEF, "num_steps": None, **params}, logit_scale=30.0)
    estimator.fit(problem.features, problem.labels, texts)
    logits: Any = estimator.selection_.held_out
    if logits is None:
        logits = class_logits(features, torch.from_numpy(estimator.targets_of(texts)), estimator.logit_scale_)
    return estimator, torch.as_tensor(np.asarray(logits)).double(), labels


@pytest.mark.parametrize("shots", [1, 4])
def test_the_logits_are_as_large_as_labels_that_they_never_saw_tell(make_problem, shots):
    """No other scale makes the labels likelier: of held-out samples or, at one shot, of the texts alone."""
    estimator, logits, labels = _scaled(make_problem, shots)

    def loss(factor):
        prior = 0.5 * (factor * estimator.logit_scale_ / 30.0 - 1) ** 2
        return float(torch.nn.functional.cross_entropy(factor * logits, labels, reduction="sum") + prior)

    assert loss(1.0) < min(loss(0.95), loss(1.05))
    assert estimator.logit_scale_ != 30.0


def test_texts_that_tell_nothing_and_fixed_steps_leave_the_size_as_it_is(make_problem):
    nothing = make_problem(shots=1).class_embeddings  # drawn anew, whatever the images are
    assert _scaled(make_problem, 1, nothing)[0].logit_scale_ == 30.0
    assert _scaled(make_problem, 4, num_steps=3)[0].logit_scale_ == 30.0
    assert _scaled(make_problem, 4, text_samples=None)[0].logit_scale_ == 30.0


def test_without_text_samples_the_targets_are_the_texts(fit, problem):
    estimator = fit(text_samples=None)
    np.testing.assert_allclose(estimator.class_targets_, problem.class_embeddings, atol=1e-6)
    other = normalize(torch.randn(3, problem.features.shape[1])).numpy()
    np.testing.assert_allclose(estimator.targets_of(other), other, atol=1e-6)


def test_targets_of_a_class_without_samples_are_those_it_would_have_had(make_problem):
    problem = make_problem(shots=4)
    seen = problem.labels < 3
    estimator = FlowMatchingAlignment(**BRIEF).fit(
        problem.features[seen], problem.labels[seen], problem.class_embeddings
    )
    found = estimator.targets_of(7 * problem.class_embeddings)
    np.testing.assert_allclose(found[3], estimator.class_targets_[3], atol=1e-6)
    assert np.abs(found[:3] - estimator.class_targets_[:3].numpy()).max() > 0.1  # these have samples


def test_the_support_alone_needs_no_texts(fit, problem):
    without = FlowMatchingAlignment(**BRIEF, text_samples=0).fit(problem.features, problem.labels, None)
    expected = fit(text_samples=0).decision_function(problem.test_features)
    np.testing.assert_allclose(without.decision_function(problem.test_features), expected, atol=1e-3)
    assert without.score(problem.test_features, problem.test_labels) > 0.9


@pytest.mark.parametrize("text_samples", [None, 8.0])
def test_without_texts_the_support_alone_decides(fit, problem, text_samples):
    without = FlowMatchingAlignment(**BRIEF, text_samples=text_samples).fit(problem.features, problem.labels)
    expected = fit(text_samples=0).decision_function(problem.test_features)
    np.testing.assert_allclose(without.decision_function(problem.test_features), expected, atol=1e-3)


def test_the_discriminative_term_tells_classes_apart(fit, problem):
    def loss(estimator):
        logits = torch.from_numpy(estimator.decision_function(problem.features))
        return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(problem.labels)))

    # few updates to far targets, at a scale where the classes are not apart at once
    options: dict[str, Any] = {"text_samples": None, "logit_scale": 10.0, "num_steps": 10}
    assert loss(fit(cross_entropy_weight=2.0, **options)) < 0.9 * loss(fit(cross_entropy_weight=0.0, **options))


def test_averaged_weights_follow_their_formula(fit, monkeypatch):
    after_update: list[list[torch.Tensor]] = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            after_update.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
            return result

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    estimator = fit(ema_decay=0.5)
    average = after_update[0]
    for number, weights in enumerate(after_update[1:], start=1):
        decay = min(0.5, (number + 1) / (number + 10))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    assert len(after_update) == 16  # 8 epochs of 2 batches are the least that make 15
    found = list(estimator.velocity_field_.parameters())
    for got, expected, last in zip(found, average, after_update[-1], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
        assert not torch.equal(got, last)


def test_bfloat16_is_close_to_float32_and_auto_is_the_one_that_is_fast(fit, plain, problem, monkeypatch):
    def moved(precision):
        return fit(precision=precision).transport(problem.test_features)

    exact, coarse = moved("fp32"), moved("bf16")
    assert 1e-6 < np.abs(exact - coarse).max() < 0.03
    assert np.abs(exact - problem.test_features).max() > 0.1  # it does move
    for fast, expected in ((True, coarse), (False, exact)):
        monkeypatch.setattr(flow_training, "has_fast_bf16", lambda device, fast=fast: fast)
        np.testing.assert_array_equal(moved("auto"), expected)


def test_a_processor_has_fast_bfloat16_if_it_has_amx(monkeypatch):
    cpu = torch.device("cpu")
    for capabilities, expected in (({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert has_fast_bf16(cpu) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_fast_bf16(cpu) is False


@pytest.mark.parametrize(
    ("samples", "epochs"),
    [(16, 160), (128, 160), (129, 80), (1600, 13), (100_000, 5)],  # 128 a batch; never fewer than 5
)
def test_epochs_follow_the_updates(samples, epochs):
    recipe = FlowRecipe(epochs=None, updates=160, batch_size=128)
    assert recipe.num_epochs(samples) == epochs
    assert FlowRecipe(epochs=7, batch_size=128).num_epochs(samples) == 7


def test_updates_are_what_the_training_makes(problem):
    heard: list[tuple[str, int, int]] = []
    FlowMatchingAlignment(**BRIEF).fit(
        problem.features, problem.labels, problem.class_embeddings, on_stage=lambda *stage: heard.append(stage)
    )
    assert heard[-1] == ("training", 8, 8)


def test_probabilities_are_averaged_over_the_read_steps(fit, plain, problem):
    estimator = fit(read_steps=(0, 2, 4), num_steps=None)
    assert (estimator.num_steps_, estimator.selection_.rule) == (4, "fixed")
    each = [fit(num_steps=step).predict_proba(problem.test_features) for step in (0, 2, 4)]
    found = estimator.predict_proba(problem.test_features)
    np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-5)
    assert np.abs(found - plain.predict_proba(problem.test_features)).max() > 1e-3
    restored = clone(estimator).restore(estimator.state(), estimator.selection_record())
    np.testing.assert_array_equal(restored.predict_proba(problem.test_features), found)
    deployed = deployment(estimator)
    assert deployed.read_steps == (0, 2, 4)
    assert deployed.plan is not None
    assert deployed.plan.num_steps == 4


@pytest.mark.parametrize("read_steps", [(), (4, 2), (0, 11)])
def test_read_steps_that_cannot_be_read_are_refused(fit, read_steps):
    with pytest.raises(ConfigError, match=r"ascending read-out steps in 0\.\.10"):
        fit(read_steps=read_steps)


@pytest.mark.parametrize("solver", ["heun", "rk4"])
def test_other_solvers_predict_and_are_not_deployed(fit, plain, problem, solver):
    estimator = fit(solver=solver)
    x = solve(estimator.velocity_field_, torch.from_numpy(problem.test_features), 4, 0.1, solver)
    found = estimator.decision_function(problem.test_features)
    np.testing.assert_allclose(found, class_logits(x, estimator.class_targets_, estimator.logit_scale_), atol=1e-3)
    assert np.abs(found - plain.decision_function(problem.test_features)).max() > 1e-3
    with pytest.raises(ConfigError, match=f"solver 'euler' for a deployment, got '{solver}'"):
        deployment(estimator)


@pytest.mark.filterwarnings("ignore::fastfsl.arrays.LogitScaleWarning")
@pytest.mark.parametrize("exits", [{"exit_margin": 1.0}, {"exit_velocity": 1e-12}])
def test_samples_that_do_not_exit_take_every_step(fit, problem, exits):
    # at this scale no probability reaches 1
    expected = fit(logit_scale=2.0).decision_function(problem.test_features)
    found = fit(logit_scale=2.0, **exits).decision_function(problem.test_features)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("exits", [{"exit_margin": 1e-9}, {"exit_velocity": 1e9}])
def test_samples_that_exit_at_once_stay_and_a_deployment_moves_them(fit, plain, problem, exits):
    estimator = fit(**exits)
    np.testing.assert_allclose(estimator.transport(problem.test_features), problem.test_features, atol=1e-6)
    deployed = deployment(estimator)
    assert deployed.plan is not None
    (state,) = plan_states(deployed.plan, torch.from_numpy(problem.test_features), deployed.read_steps)
    np.testing.assert_allclose(normalize(state), plain.transport(problem.test_features), atol=1e-5)


@pytest.mark.parametrize(("text_samples", "num_steps"), [(None, 8), (8.0, 2), (0.0, 2)])
def test_where_nothing_can_be_held_out_blended_targets_are_nearer(make_problem, text_samples, num_steps):
    problem = make_problem(shots=1)
    estimator = FlowMatchingAlignment(**{**BRIEF, "num_steps": None}, text_samples=text_samples).fit(
        problem.features, problem.labels, problem.class_embeddings
    )
    assert (estimator.selection_.rule, estimator.num_steps_) == ("default", num_steps)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"text_samples": -1.0}, "text_samples"),
        ({"logit_scale": -1.0}, "positive logit_scale"),
        ({"logit_scale": float("nan")}, "positive logit_scale"),
        ({"cross_entropy_weight": -0.1}, "cross_entropy_weight"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"precision": "fp8"}, "precision"),
        ({"updates": 0}, "updates"),
        ({"read_steps": (0, 4), "num_steps": 6}, "leave num_steps out"),
        ({"times_per_batch": 0}, "times_per_batch"),
        ({"solver": "midpoint"}, "solver"),
        ({"exit_margin": 2.0}, "margin"),
        ({"exit_velocity": 0.0}, "velocity_norm"),
        ({"exit_margin": 0.5, "solver": "heun"}, "early exit"),
        ({"exit_velocity": 0.5, "read_steps": (0, 4)}, "early exit"),
    ],
)
def test_options_out_of_range_are_named(problem, params, words):
    with pytest.raises(ConfigError, match=words):
        FlowMatchingAlignment(**{**BRIEF, **params}).fit(problem.features, problem.labels, problem.class_embeddings)
