"""The loss of a step of MPS-Tuning, put together from a tower's outputs, against the formulas in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastfsl.encoders import load_encoder
from fastfsl.errors import DataError
from fastfsl.fit.mps_objective import MPSObjective

SAMPLES, VIEWS, TOKENS, CLASSES, DIM = 4, 2, 5, 3, 128
LABELS = np.array([0, 2, 0, 0])  # class 1 is absent, class 2 has one sample
ALPHA, LAMBDA_1, LAMBDA_2, SCALE = 0.3, 0.7, 0.2, 15.6


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("tiny-clip")


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    rows = (SAMPLES * VIEWS, DIM)
    shapes = {
        "tuned": rows,
        "frozen": rows,
        "last_stream": rows,
        "previous_stream": rows,
        "tuned_tokens": (*rows[:1], TOKENS, DIM),
        "frozen_tokens": (*rows[:1], TOKENS, DIM),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def by_formulas(outputs, texts, sculpting_texts, tau, norm, align):
    outputs = {name: array.astype(np.float64) for name, array in outputs.items()}
    tuned, frozen = (unit(outputs[name]) for name in ("tuned", "frozen"))
    logits = SCALE * (ALPHA * tuned + (1 - ALPHA) * frozen) @ texts.astype(np.float64).T
    logits = (logits[0::2] + logits[1::2]) / 2  # views of an image stand side by side
    loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(SAMPLES), LABELS])

    def distance(first, second):
        difference = unit(first) @ unit(first).T - unit(second) @ unit(second).T
        return norm(difference).mean()

    for view in range(VIEWS):
        if "global" in align:
            loss += LAMBDA_1 * distance(outputs["tuned"][view::2], outputs["frozen"][view::2])
        if "local" in align:
            pairs = zip(outputs["tuned_tokens"][view::2], outputs["frozen_tokens"][view::2], strict=True)
            loss += LAMBDA_1 * np.mean([distance(*pair) for pair in pairs])
    labels = np.repeat(LABELS, VIEWS)
    for name, weight, temperature in (("tuned", 1, tau), ("last_stream", 1, tau), ("previous_stream", 0.5, 2 * tau)):
        queries = unit(outputs[name])
        support = np.concatenate([queries, sculpting_texts])
        classes = np.concatenate([labels, np.arange(CLASSES)])
        terms = []
        for q, query in enumerate(queries):
            others = np.arange(len(support)) != q
            weights = np.exp(support @ query / temperature)
            positives = np.flatnonzero(others & (classes == labels[q]))
            terms.append(-np.mean([np.log(weights[p] / weights[others].sum()) for p in positives]))
        loss += LAMBDA_2 * weight * np.mean(terms)
    return loss


@pytest.mark.parametrize(("gram", "norm"), [("l1", np.abs), ("squared", np.square)])
@pytest.mark.parametrize("align", [("global", "local"), ("global",), ("local",), ()])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_a_step_is_the_sum_of_its_losses(encoder, monkeypatch, gram, norm, align, progress):
    rng = np.random.default_rng(1)
    texts = unit(rng.normal(size=(CLASSES, DIM))).astype(np.float32)
    raw = (3 * texts + rng.normal(size=texts.shape)).astype(np.float32) / 10  # as the released code takes them
    objective = MPSObjective(
        encoder,
        texts,
        raw,
        alpha=ALPHA,
        alignment_weight=LAMBDA_1,
        sculpting_weight=LAMBDA_2,
        align=align,
        gram=gram,
        temperature=(0.5, 0.07),
    )
    monkeypatch.setattr(encoder, "logit_scale", SCALE)
    outputs = drawn()
    monkeypatch.setattr(
        objective.tower,
        "training_output",
        lambda pixels, *, local, streams: SimpleNamespace(
            **{
                name: torch.from_numpy(array) if local or "tokens" not in name else None
                for name, array in outputs.items()
            }
        ),
    )
    by_sample, own = objective(torch.zeros(SAMPLES, VIEWS, 3, 2, 2), progress)
    assert all(value.shape == (SAMPLES, VIEWS, DIM) for value in by_sample.values())
    loss, parts = objective.batch_loss(by_sample, torch.from_numpy(LABELS), progress)
    total = loss.item() + (0 if own is None else own.item())
    tau = (0.5, 0.07)[int(progress)]
    assert total == pytest.approx(by_formulas(outputs, texts, raw, tau, norm, align), rel=2e-6)
    assert set(parts) == {"cross_entropy", "sculpting"} | ({"alignment_global"} if "global" in align else set())


def test_what_is_switched_off_is_not_computed(encoder):
    texts = unit(np.random.default_rng(1).normal(size=(CLASSES, DIM))).astype(np.float32)
    objective = MPSObjective(encoder, texts, texts, alignment_weight=0.0, sculpting_weight=0.0)
    by_sample, own = objective(torch.zeros(2, VIEWS, 3, 32, 32), 0.0)
    assert (set(by_sample), own) == ({"tuned", "frozen"}, None)


def test_before_the_first_step_the_blend_is_the_frozen_encoder(encoder):
    texts = unit(np.random.default_rng(1).normal(size=(CLASSES, DIM))).astype(np.float32)
    objective = MPSObjective(encoder, texts, texts)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for alpha in (0.0, 0.3, 1.0):
        torch.testing.assert_close(
            objective.blended(alpha).encode_images(pixels), encoder.encode_images(pixels), atol=1e-6, rtol=0
        )
    names = {objective.blended(alpha).digest for alpha in (0.0, 0.3, 1.0)}
    assert len({*names, encoder.digest}) == 4  # features of each are cached apart


def test_tensors_of_another_tower_are_refused(encoder):
    texts = unit(np.random.default_rng(1).normal(size=(CLASSES, DIM))).astype(np.float32)
    objective = MPSObjective(encoder, texts, texts)
    state = objective.state()
    state.pop(next(iter(state)))
    with pytest.raises(DataError, match="is missing"):
        objective.load_state(state)
