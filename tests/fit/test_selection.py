from typing import Any, cast

import numpy as np
import pytest
import torch

from fastfsl.errors import ConfigError
from fastfsl.fit import selection as selection_module
from fastfsl.fit.flow_training import FlowRecipe, released_warmup_cosine, train_velocity_field, warmup_cosine
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.selection import best_step, select_num_steps
from fastfsl.flow import blended_targets, class_logits


def choose(features, plain, labels, embeddings, **options):
    recipe = FlowRecipe(num_blocks=1, epochs=1, batch_size=16)
    return select_num_steps(
        torch.from_numpy(features),
        torch.from_numpy(plain),
        torch.from_numpy(labels),
        torch.from_numpy(embeddings),
        recipe,
        max_steps=10,
        step_size=0.1,
        **options,
    )


@pytest.fixture
def trainings(monkeypatch):
    """Records what every fold is trained on, and trains nothing: v = 0."""
    seen = []

    def train(views, labels, class_targets, recipe, **_):
        seen.append((views, labels))
        return lambda x, t: torch.zeros_like(x)

    monkeypatch.setattr(selection_module, "train_velocity_field", train)
    return seen


def test_every_sample_is_held_out_once_and_never_trained_on_then(make_problem, trainings):
    problem = make_problem(shots=5)
    chosen = choose(problem.features[:, None], problem.features, problem.labels, problem.class_embeddings)
    assert (chosen.rule, chosen.num_folds) == ("folds", 5)
    everything = {row.tobytes() for row in problem.features}
    held_out: list[bytes] = []
    for views, labels in trainings:
        assert torch.bincount(labels).tolist() == [4, 4, 4, 4]
        trained = {row.numpy().tobytes() for row in views[:, 0]}
        held_out += everything - trained
    assert sorted(held_out) == sorted(everything)


def test_constant_accuracy_takes_no_step(make_problem, trainings):
    problem = make_problem(shots=5)
    chosen = choose(problem.features[:, None], problem.features, problem.labels, problem.class_embeddings)
    assert len(set(chosen.accuracy_by_step)) == 1
    assert chosen.num_steps == 0


@pytest.mark.parametrize(
    ("accuracy", "step"),
    [([0.5, 0.7, 0.7, 0.6], 2), ([0.5, 0.5, 0.5], 0), ([0.9, 0.8, 0.9], 0), ([0.1, 0.3, 0.2], 1), ([1.0], 0)],
)
def test_the_latest_of_equals_unless_no_step_helps(accuracy, step):
    assert best_step(np.array(accuracy)) == step


def test_folds_are_no_more_than_the_smallest_class_allows(make_problem, trainings):
    problem = make_problem(shots=3)
    chosen = choose(problem.features[:, None], problem.features, problem.labels, problem.class_embeddings)
    assert chosen.num_folds == 3


def test_one_class_of_one_sample_does_not_stop_the_others(make_problem, trainings):
    problem = make_problem(shots=3)
    keep = np.array([0, *range(3, 12)])
    chosen = choose(
        problem.features[keep][:, None], problem.features[keep], problem.labels[keep], problem.class_embeddings
    )
    assert chosen.rule == "folds"


def test_one_shot_holds_out_views(make_problem, trainings):
    problem = make_problem(shots=1, num_views=6)
    plain = problem.features.mean(axis=1)
    chosen = choose(problem.features, plain, problem.labels, problem.class_embeddings, num_folds=3)
    assert (chosen.rule, chosen.num_folds) == ("views", 3)
    assert [views.shape[1] for views, _ in trainings] == [4, 4, 4]


def test_one_vector_a_class_takes_the_documented_default(make_problem, trainings):
    problem = make_problem(shots=1)
    chosen = choose(problem.features[:, None], problem.features, problem.labels, problem.class_embeddings)
    assert (chosen.rule, chosen.num_steps, trainings) == ("default", 8, [])


def test_plain_features_are_what_is_held_out(make_problem, quick):
    problem = make_problem(shots=4)
    # Plain features that point at the texts already: every step count is right from 0 on.
    estimator = FlowMatchingAlignment(**quick).fit(
        problem.features,
        problem.labels,
        problem.class_embeddings,
        plain_features=problem.class_embeddings[problem.labels],
    )
    assert estimator.selection_.accuracy_by_step[0] == 1.0
    assert estimator.num_steps_ == 0


@pytest.mark.parametrize("text_samples", [None, 3.0])
def test_held_out_logits_are_the_samples_own_from_a_flow_that_has_not_seen_them(
    make_problem, monkeypatch, text_samples
):
    problem = make_problem(shots=6)
    order = np.random.default_rng(0).permutation(len(problem.labels))
    features, labels = torch.from_numpy(problem.features[order]), torch.from_numpy(problem.labels[order])
    texts = torch.from_numpy(problem.class_embeddings)
    folds = []

    def train(views, labels, class_targets, recipe, **_):
        """A flow of one constant velocity, made of what it was trained on."""
        folds.append((views[:, 0], labels, class_targets, 3 * views[:, 0].mean(dim=0)))
        velocity = folds[-1][-1]
        return lambda x, t: velocity.expand_as(x)

    monkeypatch.setattr(selection_module, "train_velocity_field", train)
    monkeypatch.setattr(selection_module, "best_step", lambda accuracy: 7)
    chosen = choose(
        features[:, None].numpy(),
        features.numpy(),
        labels.numpy(),
        texts.numpy(),
        num_folds=3,
        text_samples=text_samples,
        logit_scale=20.0,
    )
    assert chosen.num_steps == 7
    assert chosen.held_out is not None
    assert not np.isnan(chosen.held_out).any()
    for sample, found in zip(features, chosen.held_out, strict=True):
        unseen = [fold for fold in folds if not (fold[0] == sample).all(dim=1).any()]
        ((trained, of_classes, targets, velocity),) = unseen
        expected = texts if text_samples is None else blended_targets(trained, of_classes, texts, text_samples)
        torch.testing.assert_close(targets, expected)
        logits = class_logits((sample + 0.7 * velocity)[None], expected, 20.0)[0]
        np.testing.assert_allclose(found, logits, atol=1e-4)


def test_samples_that_no_fold_held_out_have_no_logits(make_problem, trainings):
    problem = make_problem(shots=1, num_views=4)
    plain = problem.features.mean(axis=1)
    assert choose(problem.features, plain, problem.labels, problem.class_embeddings).held_out is None


def test_warmup_then_cosine():
    factor = warmup_cosine(4, 24)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(14) == pytest.approx(0.5)
    assert factor(24) == pytest.approx(0.0)


def test_shared_times_are_spread_over_the_interval_and_all_used():
    from fastfsl.fit.flow_training import _draw_times

    torch.manual_seed(0)
    times, rows = _draw_times(100, 16, torch.device("cpu"))
    assert [int(time * 16) for time in times] == list(range(16))
    assert set(rows.tolist()) == set(range(16))
    own, each = _draw_times(10, 16, torch.device("cpu"))
    assert len(own) == 10
    assert each.tolist() == list(range(10))


def test_one_shot_views_do_not_judge_blended_targets(make_problem, trainings):
    problem = make_problem(shots=1, num_views=6)
    arrays = (problem.features, problem.features[:, 0], problem.labels, problem.class_embeddings)
    chosen = choose(*arrays, text_samples=8.0)
    assert (chosen.rule, chosen.num_steps, chosen.accuracy_by_step) == ("default", 2, ())
    assert trainings == []
    assert choose(*arrays).rule == "views"


@pytest.mark.parametrize(("warmup", "total"), [(7, 70), (2, 20), (1, 10), (0, 10)])
def test_the_released_warm_up_is_that_of_the_chained_scheduler(warmup, total):
    """The first update at the full rate, then k/W, and the cosine from (W - 1)/W of the rate down to 0."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 2e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    expected = []
    for update in range(1, total + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if update < warmup:
            optimizer.param_groups[0]["lr"] = 2e-4 * update / warmup
        else:
            cosine.step()
    factor = released_warmup_cosine(warmup, total)
    assert [2e-4 * factor(update) for update in range(total)] == pytest.approx(expected, rel=1e-6, abs=1e-16)
    assert factor(0) == 1.0
    if warmup == 7:
        assert max(factor(update) for update in range(1, total)) == 6 / 7


def test_the_released_warm_up_is_what_the_field_is_trained_with(make_problem):
    problem = make_problem(shots=4)
    views = torch.from_numpy(problem.features)[:, None]
    given = (views, torch.from_numpy(problem.labels), torch.from_numpy(problem.class_embeddings))
    weights = {}
    for warmup in ("linear", "released"):
        recipe = FlowRecipe(num_blocks=1, epochs=2, batch_size=4, warmup=warmup)
        weights[warmup] = torch.cat([p.flatten() for p in train_velocity_field(*given, recipe).parameters()])
    assert not torch.equal(weights["linear"], weights["released"])
    with pytest.raises(ConfigError, match="warmup 'linear' or 'released', got 'none'"):
        FlowRecipe(warmup=cast("Any", "none"))
