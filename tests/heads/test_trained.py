"""The heads that are trained in steps: Tip-Adapter-F and LP++."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from fastfsl.heads import KernelForm, LPPlusPlus, TipAdapter, TipAdapterF
from fastfsl.heads.blending import fit_weights


def test_trained_keys_are_those_of_the_loss_written_with_loops(make_problem, to_unit):
    problem = make_problem([1, 3, 4, 2, 3])
    # One batch, two updates: AdamW's first steps, decayed by the cosine.
    estimator = TipAdapterF(betas=(2.0,), epochs=2, batch_size=64, learning_rate=0.05)
    plain = TipAdapter(betas=(2.0,)).fit(*problem.arrays)
    order = np.lexsort((np.arange(13), problem.labels))
    x, y = torch.from_numpy(to_unit(problem.features)[order]), problem.labels[order]
    texts = torch.from_numpy(to_unit(problem.class_embeddings))
    keys = x.clone().requires_grad_()
    optimizer = torch.optim.AdamW([keys], lr=0.05, eps=1e-4)
    for rate in (0.05, 0.025):
        optimizer.param_groups[0]["lr"] = rate
        loss = torch.zeros(())
        for i in range(13):
            logits = []
            for c in range(5):
                others = [j for j in range(13) if y[j] == c and (j != i or (y == c).sum() == 1)]
                mean = torch.stack([torch.exp(2.0 * (x[i] @ keys[j] - 1)) for j in others]).mean()
                logits.append(plain.selection_.prior_weight * x[i] @ texts[c] + plain.alpha_ * mean)
            loss = loss - torch.log_softmax(torch.stack(logits), dim=0)[y[i]] / 13
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    texts_array = to_unit(problem.class_embeddings)
    found = estimator._train_keys(x.numpy(), y, texts_array, plain.selection_)
    np.testing.assert_allclose(found, keys.detach().numpy(), atol=2e-4)
    assert np.abs(found - x.numpy()).max() > 0.02


def test_training_is_left_out_where_it_does_not_pay(make_problem):
    problem = make_problem(6)
    harmful = TipAdapterF(learning_rate=50.0).fit(*problem.arrays)
    assert harmful.selection_.settings["epochs"] == 0
    plain = TipAdapter().fit(*problem.arrays)
    np.testing.assert_array_equal(
        harmful.decision_function(problem.test_features), plain.decision_function(problem.test_features)
    )


def test_one_shot_keys_are_trained_under_the_rule(make_problem):
    problem = make_problem(1)
    estimator = TipAdapterF().fit(*problem.arrays)
    plain = TipAdapter().fit(*problem.arrays)
    assert estimator.selection_.settings == {"beta": 5.5, "epochs": 20}
    assert estimator.selection_.score_weight == plain.selection_.score_weight
    assert isinstance(estimator.form_, KernelForm)
    assert isinstance(plain.form_, KernelForm)
    # Their own keys tell these few samples apart: little is left to learn, but float32's rounding is far less.
    assert np.abs(estimator.form_.keys - plain.form_.keys).max() > 1e-5


def test_training_leaves_torchs_random_state_alone(make_problem):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    TipAdapterF(epochs=1).fit(*make_problem(4).arrays)
    assert torch.equal(torch.rand(3), expected)


def test_seed_of_the_batches_matters(make_problem):
    problem = make_problem(1)
    one, other = (TipAdapterF(batch_size=2, seed=seed).fit(*problem.arrays) for seed in (0, 1))
    assert np.abs(one.decision_function(problem.features) - other.decision_function(problem.features)).max() > 1e-6


@pytest.mark.parametrize("counts", [1, 6, [1, 9, 3, 20, 4]])
def test_lp_plus_plus_descends_to_the_minimum_of_its_loss(make_problem, to_unit, counts):
    problem = make_problem(counts)
    x, texts = to_unit(problem.features), to_unit(problem.class_embeddings)
    n = len(x)
    centred = x - x.mean(axis=0)
    head = LPPlusPlus()
    losses = []
    for probe, _ in head._path(x, problem.labels, texts, (1, 5, 25, 125, 625)):
        losses.append(-log_softmax(probe.apply(x), axis=1)[np.arange(n), problem.labels].mean())
        np.testing.assert_allclose(probe.apply(x), centred @ probe.weight.T, atol=1e-9)
    assert (np.diff(losses) < 0).all()
    assert losses[-1] < 0.05


def test_first_step_of_lp_plus_plus_is_the_gradient_over_twice_the_lipschitz_constants(make_problem, to_unit):
    problem = make_problem(6)
    x, texts = to_unit(problem.features), to_unit(problem.class_embeddings)
    n = len(x)
    centred = torch.from_numpy(x - x.mean(axis=0))
    t, y = torch.from_numpy(texts), torch.from_numpy(problem.labels)
    weight = torch.zeros_like(t, requires_grad=True)
    # The first multipliers: every class the text's best temperature.
    temperature = fit_weights((x @ texts.T)[None], problem.labels, np.array([100.0]))[0]
    multipliers = torch.full((5,), float(temperature), dtype=torch.float64, requires_grad=True)
    logits = centred @ (weight + multipliers[:, None] * t).T
    torch.nn.functional.cross_entropy(logits, y).backward()
    assert weight.grad is not None
    assert multipliers.grad is not None
    lipschitz = 0.5 * torch.linalg.svdvals(centred)[0] ** 2 / n
    lipschitz_multipliers = 0.5 * ((centred @ t.T) ** 2).mean(dim=0)
    expected = multipliers.detach() - multipliers.grad / (2 * lipschitz_multipliers)
    ((probe, found),) = LPPlusPlus()._path(x, problem.labels, texts, (1,))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9)
    found_weight = probe.weight - found[:, None] * texts
    np.testing.assert_allclose(found_weight, (-weight.grad / (2 * lipschitz)).numpy(), atol=1e-9)
