import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.manifold import hierarchical_sculpting_loss, sculpting_loss

# Two views of the batch; class 0 has two samples, class 4 one, class 1 one, classes 2 and 3 none.
LABELS = [0, 4, 0, 1] * 2
TEMPERATURES = [0.5, 0.1, 0.07, 0.05]


def drawn(num_queries=8, num_classes=5, dim=6, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = 3 * torch.randn(num_queries, dim, generator=generator, dtype=torch.float64)
    texts = 2 * torch.randn(num_classes, dim, generator=generator, dtype=torch.float64) + 1
    return queries.to(dtype), texts.to(dtype)


def by_loops(queries, labels, texts, temperature, *, normalize_text=True):
    """The formula term by term in float64."""
    queries, texts = (torch.as_tensor(x).double().numpy() for x in (queries, texts))
    rows = [q / math.sqrt(sum(q**2)) for q in queries]
    support = rows + [t / math.sqrt(sum(t**2)) if normalize_text else t for t in texts]
    classes = [*labels, *range(len(texts))]
    total = 0.0
    for q, row in enumerate(rows):
        others = [s for s in range(len(support)) if s != q]
        denominator = math.fsum(math.exp(sum(row * support[s]) / temperature) for s in others)
        positives = [p for p in others if classes[p] == labels[q]]
        terms = [math.log(math.exp(sum(row * support[p]) / temperature) / denominator) for p in positives]
        total -= sum(terms) / len(positives)
    return total / len(rows)


def by_differences(loss, queries, step=1e-6):
    """Gradient of a function of a float64 array, by central differences."""
    gradient = np.zeros(queries.shape)
    for index in np.ndindex(*queries.shape):
        up, down = queries.copy(), queries.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (loss(up) - loss(down)) / (2 * step)
    return gradient


def test_one_query_by_hand():
    # <q, t_0> = 1 and <q, t_1> = 0 at tau 1/2: -log(e^2 / (e^2 + 1)). The lengths of q and of the texts do not matter.
    queries, texts = torch.tensor([[3.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    loss = sculpting_loss(queries, torch.tensor([0]), texts, 0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)
    # Texts as long as they are: <q, t_0> = 5.
    loss = sculpting_loss(queries, torch.tensor([0]), texts, 5.0, normalize_text=False)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)


def test_two_views_of_a_sample_by_hand():
    # Both views on the text of their class, the other text across: two positives of e^1 and one e^0 below each.
    queries, texts = torch.eye(2, dtype=torch.float64)[[0, 0]], torch.eye(2, dtype=torch.float64)
    loss = sculpting_loss(queries, torch.tensor([0, 0]), texts, 1.0)
    assert loss.item() == pytest.approx(math.log(2 * math.e + 1) - 1, rel=1e-14)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("normalize_text", [True, False])
@pytest.mark.parametrize("labels", [LABELS, [3], [2, 0, 1], [1] * 4], ids=["views", "one", "apart", "together"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_are_those_of_loops_in_float64(dtype, labels, normalize_text, temperature):
    queries, texts = drawn(len(labels), dtype=dtype)
    loss = sculpting_loss(
        queries.requires_grad_(), torch.tensor(labels), texts, temperature, normalize_text=normalize_text
    )
    loss.backward()
    assert loss.dtype == dtype

    def reference(rows):
        return by_loops(rows, labels, texts, temperature, normalize_text=normalize_text)

    values = queries.detach().double().numpy()
    assert loss.item() == pytest.approx(reference(values), rel=1e-7 if dtype == torch.float32 else 1e-12)
    gradient = by_differences(reference, values)
    assert np.linalg.norm(queries.grad.numpy() - gradient) < 1e-6 * np.linalg.norm(gradient) + 1e-9


@pytest.mark.parametrize("normalize_text", [True, False])
def test_gradcheck(normalize_text):
    queries, texts = drawn()
    labels = torch.tensor(LABELS)
    assert torch.autograd.gradcheck(
        lambda x: sculpting_loss(x, labels, texts, 0.5, normalize_text=normalize_text), queries.requires_grad_()
    )


@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 9), st.sampled_from(TEMPERATURES), st.data())
def test_every_shape_agrees_with_the_loops(num_queries, num_classes, dim, temperature, data):
    labels = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=num_queries, max_size=num_queries))
    queries, texts = drawn(num_queries, num_classes, dim, seed=num_queries)
    loss = sculpting_loss(queries.requires_grad_(), torch.tensor(labels), texts, temperature)
    expected = by_loops(queries.detach(), labels, texts, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    loss.backward()
    assert torch.isfinite(queries.grad).all()


def test_loss_near_zero_keeps_its_digits():
    queries, texts = torch.tensor([[1.0, 0.1]]), torch.eye(2)
    loss = sculpting_loss(queries, torch.tensor([0]), texts, 0.05)
    expected = math.log1p(math.exp(-0.9 / math.hypot(1, 0.1) / 0.05))  # 1.7e-8, below float32's rounding of 1
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_long_texts_do_not_overflow():
    queries, texts = drawn(dtype=torch.float32)
    loss = sculpting_loss(queries.requires_grad_(), torch.tensor(LABELS), 100 * texts, 0.05, normalize_text=False)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(queries.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_widened_before_anything_is_computed(dtype, autocast):
    queries, texts = drawn(dtype=dtype)
    narrow, wide = queries.clone().requires_grad_(), queries.float().requires_grad_()
    labels = torch.tensor(LABELS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = sculpting_loss(narrow, labels, texts, 0.07)
    assert loss.dtype == torch.float32
    loss.backward()
    expected = sculpting_loss(wide, labels, texts.float(), 0.07)
    expected.backward()
    assert loss.item() == expected.item()
    torch.testing.assert_close(narrow.grad, wide.grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("normalize_text", [True, False])
def test_hierarchy_weighs_three_levels(normalize_text):
    (final, texts), (last, _), (previous, _) = (drawn(seed=seed) for seed in range(3))
    expected = sum(
        weight * by_loops(queries, LABELS, texts, tau, normalize_text=normalize_text)
        for queries, tau, weight in ((final, 0.07, 1), (last, 0.07, 1), (previous, 0.14, 0.5))
    )
    loss = hierarchical_sculpting_loss(
        final, last, previous, torch.tensor(LABELS), texts, 0.07, normalize_text=normalize_text
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("queries", [torch.ones(2, 3, 4), torch.ones(2, 5), torch.ones(0, 4), torch.ones(3, 4)])
def test_shapes_that_do_not_fit_are_refused(queries):
    with pytest.raises(ShapeError, match=r"expected queries \(n, d\)"):
        sculpting_loss(queries, torch.tensor([0, 1]), torch.ones(3, 4), 0.1)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(DataError, match=r"expected labels in 0\.\.2"):
        sculpting_loss(torch.ones(2, 4), torch.tensor(labels), torch.ones(3, 4), 0.1)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ConfigError, match="temperature > 0"):
        sculpting_loss(torch.ones(2, 4), torch.tensor([0, 1]), torch.ones(3, 4), temperature)
