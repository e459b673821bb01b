import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastfsl.errors import ConfigError, ShapeError
from fastfsl.manifold import gram_alignment_loss, manifold_alignment_loss

# Mean |S - S'| at which Grams rounded to bf16 lose nearly all signs of S - S'.
DRIFT = 4e-5


def drawn(shape, *, drift=1.0, seed=0, dtype=torch.float64):
    """Features about a common mean, as an encoder's are, and a reference at some distance."""
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 2
    features = reference + drift * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return features.to(dtype), reference.to(dtype)


def by_loops(features, reference, kind, *, normalize=True):
    """Value and gradient of one Gram matrix, entry by entry in float64."""
    x, y = (rows.detach().double().numpy() for rows in (features, reference))
    n = len(x)
    lengths = np.array([np.sqrt(sum(row**2)) if normalize else 1.0 for row in x])
    u = [row / length for row, length in zip(x, lengths, strict=True)]
    v = [row / np.sqrt(sum(row**2)) if normalize else row for row in y]
    value, gradient = 0.0, np.zeros_like(x)
    for i in range(n):
        for j in range(n):
            if i == j and normalize:
                continue
            difference = sum(u[i] * u[j]) - sum(v[i] * v[j])
            value += (abs(difference) if kind == "l1" else difference**2) / n**2
            slope = (np.sign(difference) if kind == "l1" else 2 * difference) / n**2
            for one, other in ((i, j), (j, i)):
                along = sum(u[one] * u[other]) * u[one] if normalize else 0
                gradient[one] += slope * (u[other] - along) / lengths[one]
    return value, gradient


def test_two_rows_by_hand():
    # cos 60 degrees against cos 90: the two entries off the diagonal differ by 1/2, out of four.
    features = torch.tensor([[2.0, 0.0], [1.0, 3**0.5]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.0, 5.0], [1.0, 0.0]], dtype=torch.float64)
    loss = gram_alignment_loss(features, reference)
    assert loss.item() == pytest.approx(0.25, rel=1e-15)
    assert gram_alignment_loss(features, reference, "squared").item() == pytest.approx(0.125, rel=1e-15)
    (gradient,) = torch.autograd.grad(loss, features)
    # Turning the first row, of length 2, by an angle a changes |cos 60| by sin 60 a: sin 60 / 2 / 2 along y.
    expected = torch.tensor([0.0, 3**0.5 / 8], dtype=torch.float64)
    torch.testing.assert_close(gradient[0], expected, rtol=1e-14, atol=1e-15)
    # Not normalised: S = [[4, 2], [2, 4]], S' = [[25, 0], [0, 1]].
    assert gram_alignment_loss(features, reference, normalize=False).item() == pytest.approx((21 + 2 + 2 + 3) / 4)


@pytest.mark.parametrize("kind", ["l1", "squared"])
def test_it_bounds_the_gromov_wasserstein_distance_from_above(kind):
    """Under a coupling that permutes the rows the cost may be less, and among them is the identity's: the loss."""
    power = 1 if kind == "l1" else 2

    def cost(x, y, order):
        s, other = (torch.nn.functional.normalize(rows, dim=1) for rows in (x, y[list(order)]))
        return float((s @ s.T - other @ other.T).abs().pow(power).mean())

    features, reference = drawn((5, 3))
    turned = features[[2, 0, 1, 4, 3]]
    for other, least in ((reference, None), (turned, 0.0)):
        loss = float(gram_alignment_loss(features, other, kind))
        costs = [cost(features, other, order) for order in itertools.permutations(range(5))]
        assert costs[0] == pytest.approx(loss, rel=1e-12)
        assert min(costs) <= loss * (1 + 1e-12)
        if least is not None:  # the same features in another order: no distance at all, but a loss
            assert min(costs) == pytest.approx(least, abs=1e-12)
            assert loss > 0.01


@pytest.mark.parametrize("kind", ["l1", "squared"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("drift", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_are_those_of_loops_in_float64(dtype, drift, normalize, kind):
    features, reference = drawn((3, 6, 40), drift=drift, dtype=dtype)
    features.requires_grad_()
    values = gram_alignment_loss(features, reference, kind, "none", normalize=normalize)
    assert values.dtype == dtype
    values.sum().backward()
    for index in range(3):
        value, gradient = by_loops(features[index], reference[index], kind, normalize=normalize)
        assert values[index].item() == pytest.approx(value, rel=1e-6)
        error = np.linalg.norm(features.grad[index].numpy() - gradient) / np.linalg.norm(gradient)
        assert error < (1e-6 if dtype == torch.float32 else 1e-11)


def test_float32_holds_its_digits_at_the_size_of_a_vision_transformer_and_no_drift_to_speak_of():
    features, reference = drawn((4, 197, 512), drift=2e-4, dtype=torch.float32)
    single, double = (x.detach().clone().requires_grad_() for x in (features, features.double()))
    values = [gram_alignment_loss(single, reference), gram_alignment_loss(double, reference.double())]
    assert values[0].item() == pytest.approx(values[1].item(), rel=4e-7)
    for value in values:
        value.backward()
    assert (single.grad - double.grad).norm() < 1e-6 * double.grad.norm()
    # The difference of two float32 Grams does not.
    unit, unit_reference = (torch.nn.functional.normalize(x, dim=-1) for x in (features, reference))
    entries = (unit @ unit.mT - unit_reference @ unit_reference.mT).abs().mean().item()
    assert entries != pytest.approx(values[1].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "squared"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(kind, normalize):
    features, reference = drawn((2, 4, 5))
    assert torch.autograd.gradcheck(
        lambda x: gram_alignment_loss(x, reference, kind, "none", normalize=normalize), features.requires_grad_()
    )


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 33), st.sampled_from(["l1", "squared"]))
def test_every_shape_agrees_with_the_difference_of_the_grams(num_grams, num_rows, dim, kind):
    features, reference = drawn((num_grams, num_rows, dim), seed=num_grams * num_rows * dim)
    unit, unit_reference = (torch.nn.functional.normalize(x, dim=-1) for x in (features, reference))
    difference = unit @ unit.mT - unit_reference @ unit_reference.mT
    expected = (difference.abs() if kind == "l1" else difference.square()).mean(dim=(1, 2))
    torch.testing.assert_close(gram_alignment_loss(features, reference, kind, "none"), expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(gram_alignment_loss(features, reference, kind), expected.mean(), rtol=1e-9, atol=1e-14)
    total = gram_alignment_loss(features, reference, kind, "sum")
    torch.testing.assert_close(total, expected.sum(), rtol=1e-9, atol=1e-14)
    one = gram_alignment_loss(features[0], reference[0], kind, "none")
    torch.testing.assert_close(one, expected[0], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["l1", "squared"])
def test_one_sample_has_no_loss_and_no_gradient(kind, dtype):
    features, reference = drawn((1, 16), dtype=dtype)
    loss = gram_alignment_loss(features.requires_grad_(), reference, kind)
    loss.backward()
    assert loss.item() == 0
    assert not features.grad.any()


def test_reference_and_rows_of_zeros_get_no_gradient():
    features, reference = drawn((3, 4))
    assert not gram_alignment_loss(features, reference.clone().requires_grad_()).requires_grad
    features[1] = 0
    reference[2] = 0
    features.requires_grad_()
    loss = gram_alignment_loss(features, reference.requires_grad_())
    loss.backward()
    assert reference.grad is None
    assert torch.isfinite(features.grad).all()
    assert not features.grad[1].any()
    unit, unit_reference = (torch.nn.functional.normalize(x.detach(), dim=-1) for x in (features, reference))
    difference = (unit @ unit.mT - unit_reference @ unit_reference.mT).fill_diagonal_(0)
    assert loss.item() == pytest.approx(difference.abs().mean().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_widened_before_anything_is_computed(dtype, autocast):
    features, reference = drawn((2, 9, 64), drift=0.1, dtype=dtype)
    narrow, wide = features.clone().requires_grad_(), features.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = gram_alignment_loss(narrow, reference)
        assert loss.dtype == torch.float32
        loss.backward()
    expected = gram_alignment_loss(wide, reference.float())
    expected.backward()
    assert loss.item() == expected.item()
    torch.testing.assert_close(narrow.grad, wide.grad.to(dtype), rtol=0, atol=0)


def test_signs_survive_bf16_features_but_not_bf16_grams():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(64, 512, generator=generator).to(torch.bfloat16)
    # One feature in a hundred moves by one bf16 step or so: a drift that bf16 features can express at all.
    moved = torch.rand(64, 512, generator=generator) < 0.012
    features = (reference * torch.where(moved, 1 + 2.0**-7, 1.0)).to(torch.bfloat16)
    x, y = features.double(), reference.double()
    unit, unit_reference = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    gram, gram_reference = unit @ unit.T, unit_reference @ unit_reference.T
    exact = gram - gram_reference
    assert exact.abs().mean().item() == pytest.approx(DRIFT, rel=0.25)
    apart = ~torch.eye(64, dtype=torch.bool)
    rounded = gram.to(torch.bfloat16) - gram_reference.to(torch.bfloat16)
    assert (rounded.sign() == exact.sign())[apart].float().mean() < 0.5

    # The gradient is W F^ without its part along f^: the exact one if and only if all signs are.
    wide = features.float().requires_grad_()  # so that the gradient is not rounded in its turn
    (gradient,) = torch.autograd.grad(gram_alignment_loss(wide, reference), wide)
    weights = exact.sign() * apart
    expected = weights @ unit * (2 / 64**2)
    expected = (expected - unit * (expected * unit).sum(dim=1, keepdim=True)) / x.norm(dim=1, keepdim=True)
    assert (gradient.double() - expected).norm() < 1e-6 * expected.norm()


def test_view_is_global_plus_local():
    features, reference = drawn((3, 5))
    tokens, reference_tokens = drawn((3, 4, 5), seed=1)
    parts = [gram_alignment_loss(features, reference), gram_alignment_loss(tokens, reference_tokens)]
    both = manifold_alignment_loss(features, reference, tokens, reference_tokens)
    torch.testing.assert_close(both, parts[0] + parts[1])
    torch.testing.assert_close(manifold_alignment_loss(features, reference, None, None), parts[0])
    torch.testing.assert_close(manifold_alignment_loss(None, None, tokens, reference_tokens), parts[1])
    squared = manifold_alignment_loss(features, reference, None, None, kind="squared")
    torch.testing.assert_close(squared, gram_alignment_loss(features, reference, "squared"))
    counted = manifold_alignment_loss(
        features, reference, tokens, reference_tokens, gram_loss=lambda x, _y, _kind: x.new_tensor(x.ndim)
    )
    assert counted.item() == 5


@pytest.mark.parametrize(
    ("shape", "other"), [((3, 4), (3, 5)), ((3,), (3,)), ((2, 2, 3, 4),) * 2, ((0, 4), (0, 4)), ((3, 4), (1, 3, 4))]
)
def test_shapes_that_do_not_fit_are_refused(shape, other):
    with pytest.raises(ShapeError, match="expected features and reference of one shape"):
        gram_alignment_loss(torch.ones(shape), torch.ones(other))


def test_unknown_options_and_halves_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ConfigError, match="kind"):
        gram_alignment_loss(x, x, "l2")  # type: ignore[arg-type]  # what an untyped caller passes
    with pytest.raises(ConfigError, match="reduction"):
        gram_alignment_loss(x, x, reduction="max")  # type: ignore[arg-type]  # the same
    with pytest.raises(ConfigError, match="one without the other"):
        manifold_alignment_loss(x, None, x[None], x[None])
    with pytest.raises(ConfigError, match="nothing to align"):
        manifold_alignment_loss(None, None, None, None)
