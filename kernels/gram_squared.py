"""The squared Gram alignment loss by d x d products, for many rows: N enters linearly.

With E = F - G and P = F + G, E taken before any rounding, D = S - S' = (P E^T + E P^T) / 2 and

    sum D^2 = (<E^T E, P^T P> + <P^T E, E^T P>) / 2,    4 D F = E (P^T P + P^T E) + P (E^T E + E^T P).

The form ||F^T F||^2 + ||G^T G||^2 - 2 ||F^T G||^2 would cancel where F is near G, where training starts. One image at a
time: beside the gradient, memory for three d x d matrices and some thousand rows.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfsl.kernels.gram_rows import CHANGE, DRIFT, LENGTH, REFERENCE_SCALE, SCALE, SLOPE, UNIT_WIDTH

# Rows at a time: the float32 of them is then about as much as the d x d matrices.
_ROWS = 512


def squared_by_columns(
    features: Tensor,
    reference: Tensor,
    stats: Tensor,
    gradient: tuple[Tensor, Tensor] | None,
    *,
    normalize: bool,
) -> Tensor:
    """Sum of the squared entries of D for each image, (B,) float32; operands of products have the features' dtype.

    Args:
        features: (B, N, d).
        reference: (B, N, d).
        stats: of `gram_kernels.rows_kernel`, (B, 6, N); with a gradient, p is put in.
        gradient: (B, N, d) and its units, to put r in as `gram_kernels` does; None: the value alone.
        normalize: whether rows are normalised.
    """
    values = []
    for image, (f, g, statistics) in enumerate(zip(features, reference, stats, strict=True)):
        # Powers of two that bring E and P near 1: float16 then holds what they are made of.
        e_unit, p_unit = (_power_of_two(statistics[row].amax()) for row in (DRIFT.value, LENGTH.value))
        e_e, p_p, p_e = f.new_zeros(3, f.shape[-1], f.shape[-1], dtype=torch.float32)
        for e, p, _ in _parts(f, g, statistics, e_unit, p_unit, normalize=normalize):
            e_e += _product(e.mT, e)
            p_p += _product(p.mT, p)
            p_e += _product(p.mT, e)
        values.append((torch.vdot(e_e.ravel(), p_p.ravel()) + (p_e * p_e.mT).sum()) * (e_unit * p_unit).square() / 2)
        if gradient is not None:
            # In units of the two; an operand again, so each to its own power of two.
            p_p, e_e = p_p * p_unit + p_e * e_unit, e_e * e_unit + p_e.mT * p_unit
            p_p_unit, e_e_unit = _power_of_two(p_p.abs().amax()), _power_of_two(e_e.abs().amax())
            to_e, to_p = (p_p / p_p_unit).to(f.dtype), (e_e / e_e_unit).to(f.dtype)
            scale = e_unit * p_unit / 4
            for e, p, rows in _parts(f, g, statistics, e_unit, p_unit, normalize=normalize):
                r = _product(e, to_e).mul_(scale * p_p_unit).add_(_product(p, to_p).mul_(scale * e_e_unit))
                statistics[SLOPE.value, rows] = (r * f[rows]).sum(dim=-1)
                _put(r, gradient[0][image, rows], gradient[1][image, rows])
    return torch.stack(values)


def _parts(
    f: Tensor, g: Tensor, stats: Tensor, e_unit: Tensor, p_unit: Tensor, *, normalize: bool
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """E / e_unit and P / p_unit, some rows at a time, and which."""
    for start in range(0, len(f), _ROWS):
        rows = slice(start, start + _ROWS)
        x, y = f[rows].float(), g[rows].float()
        e = x - y
        if normalize:
            s, t, c = (stats[row.value, rows, None] for row in (SCALE, REFERENCE_SCALE, CHANGE))
            e = e * s + y * c
            x, y = x * s, y * t
        yield (e / e_unit).to(f.dtype), ((x + y) / p_unit).to(f.dtype), rows


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A float32 product of operands of any dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _power_of_two(x: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(x.clamp(min=2.0**-100))))


def _put(r: Tensor, gradient: Tensor, units: Tensor) -> None:
    """Rows in units of a power of two by row and UNIT_WIDTH columns."""
    dim = r.shape[-1]
    parts = F.pad(r, (0, -dim % UNIT_WIDTH.value)).unflatten(-1, (-1, UNIT_WIDTH.value))
    units.copy_(_power_of_two(parts.abs().amax(dim=-1)))
    gradient.copy_((parts / units[..., None]).flatten(-2)[:, :dim])
