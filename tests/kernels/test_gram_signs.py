"""Signs of S - S' off the diagonal where training starts: those of the kernel, and those of other ways to compute it.

Mean |S - S'| is 4e-5, inputs have 16 bits; the exact value is that of the rounded inputs in float64. Tensor cores are
modelled as exact sums of 16 products, added to a float32 sum that is rounded or cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfsl.kernels.gram_loss import gram_difference

DRIFT = 4e-5
DTYPES = [torch.float16, torch.bfloat16]
Rounding = Callable[[Tensor], Tensor]


def start_of_training(
    shape: tuple[int, int], dtype: torch.dtype, *, normalize: bool, common: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and reference with a common mean, of 16 bits, and the exact S - S', whose mean size is DRIFT."""
    generator = torch.Generator().manual_seed(0)
    dim = shape[-1]
    reference = torch.randn(shape, generator=generator) + common * torch.randn(1, dim, generator=generator)
    if not normalize:
        reference /= reference.norm(dim=-1, keepdim=True)
    noise = torch.randn(shape, generator=generator) * reference.norm(dim=-1, keepdim=True) / dim**0.5
    low, high = 1e-6, 1e-1
    for _ in range(30):
        middle = (low * high) ** 0.5
        features = (reference + middle * noise).to(dtype)
        exact = exact_difference(features, reference.to(dtype), normalize=normalize)
        low, high = (low, middle) if off_diagonal(exact).abs().mean() > DRIFT else (middle, high)
    return features, reference.to(dtype), exact


def exact_difference(features: Tensor, reference: Tensor, *, normalize: bool) -> Tensor:
    f, g = features.double(), reference.double()
    if normalize:
        f, g = (x / x.norm(dim=-1, keepdim=True) for x in (f, g))
    return f @ f.T - g @ g.T


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def agreement(found: Tensor, exact: Tensor) -> float:
    return float((off_diagonal(found).sign() == off_diagonal(exact).sign()).double().mean())


@pytest.mark.parametrize("normalize", [True, False])
def test_the_kernel_finds_the_signs_where_training_starts(normalize):
    # Of bfloat16 the interpreter computes nonsense; the emulation below has it, and the suite for cards.
    features, reference, exact = start_of_training((197, 512), torch.float16, normalize=normalize)
    found = gram_difference(features, reference, normalize=normalize)
    assert found.dtype == torch.float32
    assert 0.9 * DRIFT < off_diagonal(exact).abs().mean() < 1.1 * DRIFT
    assert agreement(found, exact) >= 0.9995
    error = (off_diagonal(found) - off_diagonal(exact)).norm() / off_diagonal(exact).norm()
    assert error <= 1e-3
    assert torch.equal(found.diagonal(), torch.zeros(197)) == normalize
    if not normalize:
        torch.testing.assert_close(found.diagonal().double(), exact.diagonal(), rtol=0, atol=5e-7)


def test_a_batch_is_as_its_images():
    features, reference = (torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    together = gram_difference(features, reference)
    assert together.shape == (2, 5, 5)
    assert torch.equal(together[1], gram_difference(features[1], reference[1]))
    assert torch.equal(together, gram_difference(features.requires_grad_(), reference))


def rounded(x: Tensor) -> Tensor:
    return x.float()


def cut_off(x: Tensor) -> Tensor:
    """Towards zero."""
    nearest = x.float()
    lower = (nearest.view(torch.int32) - 1).view(torch.float32)
    return torch.where(nearest.double().abs() > x.abs(), lower, nearest)


def chained(sums: Tensor, x: Tensor, y: Tensor, add: Rounding) -> Tensor:
    """sums + x y^T, 16 columns at a time."""
    for k in range(0, x.shape[1], 16):
        sums = add(sums.double() + x[:, k : k + 16] @ y[:, k : k + 16].T)
    return sums


def ways(features: Tensor, reference: Tensor, add: Rounding, *, normalize: bool) -> dict[str, Tensor]:
    """S - S' by the kernel's blocks, by two Gram matrices in float32 or in 16 bits, and by (P E^T + E P^T) / 2."""
    dtype = features.dtype
    f, g = features.double(), reference.double()
    s, t = ((1 / x.norm(dim=-1, keepdim=True)) if normalize else torch.ones(len(x), 1).double() for x in (f, g))
    c = s - t
    zero = torch.zeros(len(f), len(f))
    a = b = zero
    for k in range(0, f.shape[1], 64):
        part = slice(k, k + 64)
        theirs = chained(zero, g[:, part], g[:, part], add)
        a = chained(a, f[:, part], f[:, part], add) - theirs
        b = b + theirs
    ours, theirs = (chained(zero, x, x, add) * (scale * scale.T).float() for x, scale in ((f, s), (g, t)))
    e, p = (x.to(dtype).double() for x in ((f - g) * s + g * c, f * s + g * t))
    return {
        "blocks": a * (s * s.T).float() + (s * c.T + c * t.T).float() * b,
        "float32": ours - theirs,
        "16 bits": (ours.to(dtype) - theirs.to(dtype)).float(),
        "P and E": chained(chained(zero, p, e, add), e, p, add) / 2,
    }


@pytest.mark.parametrize("common", [0.0, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_by_blocks_keep_more_signs_than_other_ways(dtype, normalize, common):
    features, reference, exact = start_of_training((256, 768), dtype, normalize=normalize, common=common)
    for add in (rounded, cut_off):
        found = ways(features, reference, add, normalize=normalize)
        share: dict[str, Any] = {name: agreement(difference, exact) for name, difference in found.items()}
        print(dtype, "normalised" if normalize else "as given", common, add.__name__, share)
        assert share["blocks"] >= 0.9995
        if common:  # entries of S are then far from 0, as those of features are
            assert share["16 bits"] <= 0.15
            assert share["blocks"] > share["float32"]
            assert not normalize or share["blocks"] > share["P and E"]
