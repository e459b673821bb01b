"""Several targets a class: who is sent where, what is learned of it, and what is kept."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from fastfsl.errors import ConfigError, DataError
from fastfsl.fit import selection as selection_module
from fastfsl.fit.deployment import deployment
from fastfsl.fit.flow_training import FlowRecipe, train_velocity_field
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.prototypes import assign_prototypes
from fastfsl.flow import blended_targets, normalize, plan_states

CLASSES, DIM = 3, 12
BRIEF: dict[str, Any] = {"num_blocks": 1, "updates": 30, "batch_size": 16, "learning_rate": 1e-2, "num_steps": 4}


class TwoModes:
    """Classes of two opposite modes, whose means tell nothing."""

    def __init__(self, shots: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        axes = np.linalg.qr(np.random.default_rng(9).normal(size=(DIM, DIM)))[0][:CLASSES]
        self.labels = np.repeat(np.arange(CLASSES), shots)
        self.modes = np.arange(len(self.labels)) % 2
        centres = axes[self.labels] * (1 - 2 * self.modes)[:, None]
        self.features = centres + 0.05 * rng.normal(size=centres.shape)
        self.features = (self.features / np.linalg.norm(self.features, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def support():
    return TwoModes(8)


@pytest.fixture(scope="module")
def fit(support):
    def run(**params):
        options = {**BRIEF, "text_samples": 0, **params}
        return FlowMatchingAlignment(**options).fit(support.features, support.labels, None)

    return run


def assign(features, labels, num_prototypes):
    found = assign_prototypes(
        normalize(torch.as_tensor(features))[:, None], torch.as_tensor(labels), num_prototypes, seed=0
    )
    assert found is not None
    return found.tolist()


def test_samples_of_one_mode_share_a_prototype(support):
    found = np.array(assign(support.features, support.labels, 2))
    for label in range(CLASSES):
        own = found[support.labels == label]
        assert len(set(own[::2])) == len(set(own[1::2])) == 1
        assert own[0] != own[1]


def test_a_class_has_no_more_prototypes_than_distinct_samples():
    features = torch.eye(5)[[0, 0, 0, 1, 2, 3]]
    found = assign(features, [0, 0, 0, 1, 3, 3], 3)  # there is no class 2
    assert found[:4] == [0, 0, 0, 0]
    assert sorted(found[4:]) == [0, 1]


def test_one_prototype_needs_no_assignment(support):
    views = torch.from_numpy(support.features)[:, None]
    assert assign_prototypes(views, torch.from_numpy(support.labels), 1, seed=0) is None


def test_two_modes_need_two_prototypes(fit):
    test = TwoModes(40, seed=1)
    assert fit().score(test.features, test.labels) < 0.9
    estimator = fit(num_prototypes=2)
    assert estimator.score(test.features, test.labels) > 0.98
    assert estimator.class_targets_.shape == (CLASSES, 2, DIM)
    moved = torch.from_numpy(estimator.transport(test.features))
    expected = 100 * (moved @ estimator.class_targets_.flatten(0, 1).T).reshape(-1, CLASSES, 2).amax(dim=2)
    np.testing.assert_allclose(estimator.decision_function(test.features), expected, atol=1e-3)


def test_every_sample_is_sent_to_its_own_prototype(support):
    views, labels = torch.from_numpy(support.features)[:, None], torch.from_numpy(support.labels)
    prototypes = torch.from_numpy(support.modes)
    rows = [views[(labels == label) & (prototypes == one), 0].mean(0) for label in range(CLASSES) for one in (0, 1)]
    targets = -normalize(torch.stack(rows)).unflatten(0, (CLASSES, 2))  # to the other side
    recipe = FlowRecipe(num_blocks=1, epochs=60, batch_size=24, learning_rate=1e-2)
    field = train_velocity_field(views, labels, targets, recipe, prototypes=prototypes)
    end = views[:, 0] + field(views[:, 0], torch.zeros(1))
    assert torch.equal((end @ targets.flatten(0, 1).T).argmax(dim=1), 2 * labels + prototypes)


def test_a_fold_clusters_its_own_samples(support, monkeypatch):
    seen = []

    def train(views, labels, class_targets, recipe, *, prototypes, **_):
        seen.append((views, labels, class_targets, prototypes))
        return lambda x, t: torch.zeros_like(x)

    monkeypatch.setattr(selection_module, "train_velocity_field", train)
    features, labels = torch.from_numpy(support.features), torch.from_numpy(support.labels)
    texts = torch.ones(CLASSES, DIM) / DIM**0.5
    chosen = selection_module.select_num_steps(
        features[:, None],
        features,
        labels,
        texts,
        FlowRecipe(),
        max_steps=10,
        step_size=0.1,
        text_samples=0.0,
        num_prototypes=2,
        num_folds=4,
    )
    assert len(seen) == 4
    for views, of_classes, targets, prototypes in seen:
        assert prototypes.tolist() == assign(views[:, 0], of_classes, 2)
        torch.testing.assert_close(targets, blended_targets(views[:, 0], of_classes, texts, 0.0, prototypes))
    assert chosen.accuracy_by_step[0] == 1.0  # two prototypes know the modes where they stand
    assert chosen.held_out is not None
    assert chosen.held_out.shape == (len(labels), CLASSES)


def test_prototypes_are_kept_restored_and_deployed(fit, support):
    estimator = fit(num_prototypes=2, read_steps=(0, 2, 4))
    expected = estimator.decision_function(support.features)
    restored = clone(estimator).restore(estimator.state(), estimator.selection_record())
    np.testing.assert_array_equal(restored.decision_function(support.features), expected)
    np.testing.assert_array_equal(restored.classes_, np.arange(CLASSES))
    deployed = deployment(estimator)
    np.testing.assert_array_equal(deployed.class_embeddings, estimator.class_targets_)
    assert deployed.plan is not None
    assert len(plan_states(deployed.plan, torch.from_numpy(support.features), deployed.read_steps)) == 3
    with pytest.raises(DataError, match="expected num_prototypes 1"):
        clone(estimator).set_params(num_prototypes=1).restore(estimator.state(), estimator.selection_record())


def test_early_exits_take_the_nearest_prototype(fit, support):
    estimator = fit(num_prototypes=2, exit_margin=0.999)
    assert estimator.score(support.features, support.labels) > 0.98


@pytest.mark.parametrize("params", [{"num_prototypes": 0}, {"num_prototypes": 2, "text_samples": None}])
def test_prototypes_that_cannot_be_are_refused(make_problem, params):
    problem = make_problem(shots=2)
    with pytest.raises(ConfigError, match="num_prototypes >= 1, and text_samples if more than one"):
        FlowMatchingAlignment(**params).fit(problem.features, problem.labels, problem.class_embeddings)
