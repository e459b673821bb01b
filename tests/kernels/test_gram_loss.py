"""The compiled Gram loss in Triton's interpreter: values and gradients against float64, and what torch asks of it."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from fastfsl import manifold
from fastfsl.errors import ConfigError, DeviceError, ShapeError
from fastfsl.kernels import gram_loss, gram_rows, gram_squared
from fastfsl.kernels.gram_loss import gram_alignment, gram_alignment_gradient, gram_alignment_loss, gram_difference

KINDS = ("l1", "squared")
# One row; fewer than a tile; three tiles of 64 and five rows; one row past two column tiles of 128. The interpreter is
# slow in float32, whose tiles are small.
SHAPES = {
    torch.float32: {1: (2, 1, 128), 5: (1, 5, 640), 197: (1, 197, 32), 257: (1, 257, 16)},
    torch.float16: {1: (2, 1, 128), 5: (2, 5, 768), 197: (1, 197, 512), 257: (1, 257, 128)},
}


def drawn(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, drift: float = 0.05, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows with a common mean, each of a length of its own from 0.5 to 1.5, and a reference at some distance."""
    generator = torch.Generator().manual_seed(seed)
    dim = shape[-1]
    reference = (torch.randn(shape, generator=generator) + torch.randn(dim, generator=generator) / 2) / dim**0.5
    features = reference + drift * torch.randn(shape, generator=generator) / dim**0.5
    lengths = 0.5 + torch.rand(*shape[:-1], 1, generator=generator)
    return (features * lengths).to(dtype), (reference * lengths).to(dtype)


def step(
    loss: Any, features: Tensor, reference: Tensor, *arguments: Any, scale: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Value and gradient times N sqrt(N d), at which its entries are of about one."""
    rows = features.detach().clone().requires_grad_()
    value = loss(rows, reference, *arguments, **options)
    n, dim = features.shape[-2:]
    (gradient,) = torch.autograd.grad(value, rows, torch.full_like(value, scale * n * (n * dim) ** 0.5))
    assert gradient.dtype == features.dtype
    return value.detach(), gradient


def plain(features: Tensor, reference: Tensor, kind: str, *, normalize: bool) -> Tensor:
    """As research code writes it, two Gram matrices in the dtype of the features."""
    if normalize:
        features, reference = (torch.nn.functional.normalize(x, dim=-1) for x in (features, reference))
    difference = (torch.bmm(features, features.mT) - torch.bmm(reference, reference.mT)).float()
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def distance(out: Tensor, exact: Tensor) -> float:
    """Relative, or absolute where `exact` is 0."""
    norm = float(exact.norm())
    return float((out.double() - exact).norm()) / (norm or 1.0)


def slow_unless(*, fast: bool) -> tuple[pytest.MarkDecorator, ...]:
    return () if fast else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("n", "dtype", "kind", "normalize"),
    [
        # Of many rows, what is published, and what is least like it.
        pytest.param(n, dtype, kind, normalize, marks=slow_unless(fast=n < 100 or (kind == "l1") == normalize))
        for n, dtype, kind, normalize in itertools.product((1, 5, 197, 257), SHAPES, KINDS, (True, False))
    ],
)
def test_value_and_gradient_are_near_those_of_float64(n, dtype, kind, normalize):
    features, reference = drawn(SHAPES[dtype][n], dtype)
    exact = step(manifold.gram_alignment_loss, features.double(), reference.double(), kind, normalize=normalize)
    ours = step(gram_alignment_loss, features, reference, kind, normalize=normalize)
    plains = step(plain, features, reference, kind, normalize=normalize)
    # Far tighter than twice the error of plain torch: rounding to float16 alone takes 2e-4 of a gradient.
    most = (3e-6, 1e-6) if dtype == torch.float32 else (2e-5, 5e-4)
    for mine, torchs, true, limit in zip(ours, plains, exact, most, strict=True):
        assert distance(mine, true) <= limit
        if n > 1 or not normalize:  # a single normalised row has S = S' = 1, and plain torch rounds that
            assert distance(mine, true) <= 2 * distance(torchs, true) + 2e-7
    alone = gram_alignment_loss(features, reference, kind, normalize=normalize)
    assert alone.item() == pytest.approx(ours[0].item(), rel=1e-6 if dtype == torch.float32 else 1e-5)


def test_float32_is_as_near_as_torchs_own_where_training_starts():
    features, reference = drawn((1, 70, 64), drift=1e-5)
    exact = step(manifold.gram_alignment_loss, features.double(), reference.double())
    torchs = step(manifold.gram_alignment_loss, features, reference)
    ours = step(gram_alignment_loss, features, reference)
    for mine, other, true in zip(ours, torchs, exact, strict=True):
        assert distance(mine, true) <= 2 * distance(other, true) + 1e-7


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize(
    ("n", "dtype"), [(70, torch.float16), pytest.param(225, torch.float16, marks=pytest.mark.slow), (33, torch.float32)]
)
def test_tiles_of_other_cards_give_the_same(monkeypatch, arch, n, dtype):
    features, reference = drawn((1, n, 48), dtype)  # 48: the last columns of the gradient's tile are none
    expected = [step(manifold.gram_alignment_loss, features.double(), reference.double(), kind) for kind in KINDS]
    monkeypatch.setattr(gram_loss, "_arch", lambda device: arch)
    monkeypatch.setattr(gram_loss, "_by_columns", lambda *_, **__: False)
    for kind, exact in zip(KINDS, expected, strict=True):
        for mine, true in zip(step(gram_alignment_loss, features, reference, kind), exact, strict=True):
            assert distance(mine, true) <= 5e-4


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_squared_kind_goes_by_columns_where_rows_are_many(monkeypatch, dtype, normalize):
    called = []
    by_columns = gram_squared.squared_by_columns

    def counted(*arguments, **options):
        called.append(1)
        return by_columns(*arguments, **options)

    monkeypatch.setattr(gram_squared, "squared_by_columns", counted)
    monkeypatch.setattr(gram_squared, "_ROWS", 64)
    features, reference = drawn((2, 110, 32), dtype, drift=1e-2)
    exact = step(manifold.gram_alignment_loss, features.double(), reference.double(), "squared", normalize=normalize)
    ours = step(gram_alignment_loss, features, reference, "squared", normalize=normalize, scale=100.0)
    plains = step(plain, features, reference, "squared", normalize=normalize)
    assert called
    exact = exact[0], 100 * exact[1]
    plains = plains[0], 100 * plains[1]
    most = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    for mine, torchs, true in zip(ours, plains, exact, strict=True):
        assert distance(mine, true) <= min(most, max(2 * distance(torchs, true), 1e-6))
    assert float(gram_alignment_loss(features, reference, "squared", normalize=normalize)) == float(ours[0])
    called.clear()
    gram_alignment_loss(features[:, :8], reference[:, :8], "squared")
    gram_alignment_loss(features[:, :8], reference[:, :8], "l1")
    assert not called


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_one_and_gets_no_gradient(kind):
    features, reference = drawn((1, 9, 64), torch.float16)
    features[:, 2], reference[:, 5] = 0, 0
    features[:, 7], reference[:, 7] = 0, 0
    exact = step(manifold.gram_alignment_loss, features.double(), reference.double(), kind)
    value, gradient = step(gram_alignment_loss, features, reference, kind)
    assert distance(value, exact[0]) <= 1e-5
    assert distance(gradient, exact[1]) <= 1e-3
    assert gradient[0, [2, 7]].abs().max() == 0
    assert step(gram_alignment_loss, torch.zeros_like(features), reference * 0)[1].abs().max() == 0


def test_equal_features_give_exactly_nothing():
    features, _ = drawn((1, 70, 32), torch.float16)
    for kind in KINDS:
        for normalize in (True, False):
            value, gradient = step(gram_alignment_loss, features, features.clone(), kind, normalize=normalize)
            assert value == 0
            assert gradient.abs().max() == 0


@pytest.mark.parametrize(
    ("n", "kind", "normalize"),
    [(33, "l1", True), (33, "l1", False), (33, "squared", True), (225, "squared", False)],
)
def test_float16_neither_overflows_nor_underflows(monkeypatch, n, kind, normalize):
    monkeypatch.setattr(gram_loss, "_by_columns", lambda *_, **__: False)
    monkeypatch.setattr(gram_loss, "_arch", lambda device: 80)  # 225 rows go by slices there
    features, reference = drawn((1, n, 32), torch.float32, drift=0.05 if kind == "l1" else 1e-3)
    features[0, 3] *= 50
    reference[0, 3] *= 50
    for length in (1e-3, 300.0) if normalize else (3e-2, 300.0):
        rows, others = (features * length).half(), (reference * length).half()
        assert rows.isfinite().all()
        exact = step(manifold.gram_alignment_loss, rows.double(), others.double(), kind, normalize=normalize)
        # The returned gradient is float16: it is brought near 1, whatever it is, as a loss scaler would.
        scale = 1 / float(exact[1].square().mean().sqrt())
        value, gradient = step(gram_alignment_loss, rows, others, kind, normalize=normalize, scale=scale)
        assert gradient.isfinite().all()
        assert distance(value, exact[0]) <= 2e-3
        assert distance(gradient, scale * exact[1]) <= 4e-3


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_ranks_are_those_of_the_torch_function(reduction):
    features, reference = drawn((3, 6, 40), torch.float32)
    weights = torch.tensor([1.0, -2.0, 0.5])
    for rows, others in ((features, reference), (features[1], reference[1])):
        results = []
        for loss in (manifold.gram_alignment_loss, gram_alignment_loss):
            leaf = rows.clone().requires_grad_()
            value = loss(leaf, others, "l1", reduction)
            (value * weights if value.ndim else value).sum().backward()
            results.append((value.detach(), leaf.grad))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_views_of_other_memory_layouts_and_dtypes_are_taken():
    features, reference = drawn((6, 3, 40), torch.float32)
    expected = gram_alignment_loss(features.transpose(0, 1).contiguous(), reference.transpose(0, 1).contiguous())
    leaf = features.clone().requires_grad_()
    value = gram_alignment_loss(leaf.transpose(0, 1), reference.transpose(0, 1))
    value.backward()
    assert value == expected
    assert leaf.grad is not None
    half = features.half().requires_grad_()
    mixed = gram_alignment_loss(half, reference)
    mixed.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16
    assert mixed.item() == gram_alignment_loss(half.detach().float(), reference).item()


def test_the_same_bits_come_every_time():
    features, reference = drawn((2, 70, 32), torch.float16)
    for kind in KINDS:
        first, second = (step(gram_alignment_loss, features, reference, kind) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # An image's part does not depend on what it is computed beside.
    alone = gram_alignment_loss(features[1:], reference[1:], "l1", "none")
    assert torch.equal(gram_alignment_loss(features, reference, "l1", "none")[1:], alone)


def test_a_second_backward_pass_gives_the_same_and_changes_nothing():
    features, reference = drawn((2, 20, 32), torch.float16)
    leaf, before = features.clone().requires_grad_(), (features.clone(), reference.clone())
    value = gram_alignment_loss(leaf, reference)
    kept = value.grad_fn.computed.gradient.data_ptr()  # type: ignore[union-attr]
    (first,) = torch.autograd.grad(value, leaf, torch.tensor(900.0), retain_graph=True)
    assert first.data_ptr() == kept  # in place
    copy = first.clone()
    (second,) = torch.autograd.grad(value, leaf, torch.tensor(1800.0), retain_graph=True)
    (third,) = torch.autograd.grad(value, leaf, torch.tensor(900.0))
    assert torch.equal(first, copy)
    assert torch.equal(third, first)
    torch.testing.assert_close(second, 2 * first)
    assert torch.equal(leaf.detach(), before[0])
    assert torch.equal(reference, before[1])


def test_autocast_changes_nothing():
    for kind, n in (("l1", 5), ("squared", 100)):
        features, reference = drawn((1, n, 16))
        expected = step(gram_alignment_loss, features, reference, kind)
        with torch.autocast("cpu", torch.bfloat16):
            found = step(gram_alignment_loss, features, reference, kind)
        assert found[0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_gives_the_same_bits(kind):
    features, reference = drawn((2, 20, 32), torch.float16)

    def training(rows: Tensor, others: Tensor) -> Tensor:
        return 500 * gram_alignment_loss(rows * 1.5, others, kind) + rows.float().mean()

    expected = step(training, features, reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while it traces
        found = step(torch.compile(training, backend="aot_eager", fullgraph=True), features, reference)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    without = torch.compile(lambda f, r: gram_alignment_loss(f, r, kind), backend="aot_eager", fullgraph=True)
    assert without(features, reference) == gram_alignment_loss(features, reference, kind)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own copies
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_finds_no_fault_with_the_operators(reduction):
    features, reference = drawn((2, 5, 32), torch.float16)
    how = ("l1", reduction, True, False)
    for with_gradient in (True, False):
        rows = features.clone().requires_grad_(with_gradient)
        torch.library.opcheck(gram_alignment, (rows, reference, *how, with_gradient))
    value, *computed = gram_alignment(features, reference, *how, True)
    torch.library.opcheck(gram_alignment_gradient, (features, *computed, torch.ones_like(value), *how))
    leaf = features.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="with_gradient=True"):
        gram_alignment(leaf, reference, *how, False)[0].sum().backward()


def test_what_cannot_be_computed_is_refused(monkeypatch):
    features, reference = drawn((2, 5, 32))
    for rows, others in ((features, reference[:1]), (features[0, 0], reference[0, 0]), (features[:0], reference[:0])):
        with pytest.raises(ShapeError, match="the same rows"):
            gram_alignment_loss(rows, others)
    with pytest.raises(ShapeError, match=r"float64.*fastfsl\.manifold"):
        gram_alignment_loss(features.double(), reference)
    with pytest.raises(ConfigError, match="'l1' or 'squared'"):
        gram_alignment_loss(features, reference, "l2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'mean', 'sum' or 'none'"):
        gram_alignment_loss(features, reference, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="one CUDA card"):
        gram_alignment_loss(features, reference.to("meta"))
    # Without the interpreter a kernel is one that is compiled, and needs a card.
    monkeypatch.setattr(triton, "JITFunction", type(gram_rows.rows_kernel))
    for call in (gram_alignment_loss, gram_difference):
        with pytest.raises(DeviceError, match=r"CUDA card.*cpu.*fastfsl\.manifold\.gram_alignment_loss"):
            call(features, reference)
