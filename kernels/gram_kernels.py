"""Triton kernels of the Gram alignment loss: D = S - S' by tiles, its value, and the gradient.

S_ij = s_i s_j f_i.f_j and S'_ij = t_i t_j g_i.g_j, with s = 1/|f| and t = 1/|g| where rows are normalised, else 1. With

    a_ij = f_i.f_j - g_i.g_j,   b_ij = g_i.g_j,   c = s - t   (free of cancellation, from `rows_kernel`)

it is D_ij = s_i s_j a_ij + (s_i c_j + c_i t_j) b_ij. W is sign(D) or D, and the gradient of a row is proportional to

    s_i (r_i - s_i^2 p_i f_i),   r_i = sum_j W_ij s_j f_j,   p_i = sum_j W_ij s_j f_i.f_j = r_i.f_i;

the second term, the projection, is there where rows are normalised. Reference: fastfsl/manifold/gram.py.

`whole_kernel` or `sliced_kernel` give value, r and p in one pass over tiles of D, `finish_kernel` the gradient when its
factor is known, `value_kernel` the value alone. Shapes: features and reference (B, N, d), row-major; stats (B, 6, N)
float32; an image is a Gram matrix. Each program writes only its own part of every output and sums it in a fixed order:
the same bits every run. Compiled for six architectures, not yet run on a card.
"""

import triton
import triton.language as tl

from fastfsl.kernels.gram_products import difference_tile
from fastfsl.kernels.gram_rows import DRIFT, LENGTH, SCALE, SLOPE, UNIT_WIDTH, finish_kernel, rows_kernel
from fastfsl.kernels.tiles import Tile


@triton.jit
def _power_of_two(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest power of two up to x, at least 2^-100, and one over it; both exact."""
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 27 << 23)
    return exponent.to(tl.float32, bitcast=True), ((254 << 23) - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _operand_scale(
    stats: tl.tensor, n: tl.tensor, SQUARED: tl.constexpr, NORMALIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A power of two that keeps every |W_ij s_j| of the image up to 2^15, as float16 holds it; and its inverse."""
    o_j = tl.arange(0, 256)
    scales = tl.zeros([256], tl.float32)
    drifts = tl.zeros([256], tl.float32)
    lengths = tl.zeros([256], tl.float32)
    for start in tl.range(0, n, 256, num_stages=1):
        j = start + o_j
        if NORMALIZE:
            scales = tl.maximum(scales, tl.load(stats + SCALE * n + j, mask=j < n, other=0.0))
        if SQUARED:
            drifts = tl.maximum(drifts, tl.load(stats + DRIFT * n + j, mask=j < n, other=0.0))
            lengths = tl.maximum(lengths, tl.load(stats + LENGTH * n + j, mask=j < n, other=0.0))
    bound = tl.max(scales, axis=0) if NORMALIZE else tl.max(lengths, axis=0) * 0 + 1.0
    if SQUARED:
        bound = bound * 2 * tl.max(drifts, axis=0) * tl.max(lengths, axis=0)
    floor, inverse = _power_of_two(bound)
    return 16384.0 * inverse, floor / 16384.0


@triton.jit
def _weights(
    features: tl.tensor,
    reference: tl.tensor,
    stats: tl.tensor,
    unit: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of one tile: unit W_ij s_j as an operand, the sum of |D| or D^2, and its part of p_i."""
    d, product = difference_tile(
        features, reference, stats, i, j, n, D, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if SQUARED:
        w = d
        value = tl.sum(tl.sum(d * d, axis=1), axis=0)
    else:
        w = tl.where(d > 0, 1.0, 0.0) - tl.where(d < 0, 1.0, 0.0)
        value = tl.sum(tl.sum(tl.abs(d), axis=1), axis=0)
    slope = tl.zeros([BLOCK_M], tl.float32)
    w = w * unit
    if NORMALIZE:
        w = w * tl.load(stats + SCALE * n + j, mask=j < n, other=0.0)[None, :]
    w = w.to(features.dtype.element_ty)
    if NORMALIZE:
        slope = tl.sum(w.to(tl.float32) * product, axis=1)
    return w, value, slope


@triton.jit
def _save(
    total: tl.tensor,
    inverse_unit: tl.tensor,
    gradient: tl.tensor,
    units: tl.tensor,
    i: tl.tensor,
    part: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write BLOCK_D columns of r, which is `total` times `inverse_unit`, in units of a power of two for every row.

    Written are numbers below 2 in absolute value, so that float16 holds them.
    """
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (i < n)[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (columns < D)[None, :]
    row_unit, inverse = _power_of_two(tl.max(tl.abs(total), axis=1))
    rows = (total * inverse[:, None]).to(gradient.dtype.element_ty)
    tl.store(gradient + i[:, None] * D + columns[None, :], rows, mask=mask)
    UNITS: tl.constexpr = (D + UNIT_WIDTH - 1) // UNIT_WIDTH
    o_u = part * (BLOCK_D // UNIT_WIDTH) + tl.arange(0, BLOCK_D // UNIT_WIDTH)
    row_units = tl.broadcast_to((row_unit * inverse_unit)[:, None], [i.shape[0], BLOCK_D // UNIT_WIDTH])
    tl.store(units + i[:, None] * UNITS + o_u[None, :], row_units, mask=(i < n)[:, None] & (o_u < UNITS)[None, :])


@triton.jit(do_not_specialize=["n"])
def whole_kernel(
    features: tl.tensor,
    reference: tl.tensor,
    stats: tl.tensor,
    values: tl.tensor,
    gradient: tl.tensor,
    units: tl.tensor,
    weight: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Value and gradient of a row tile whose weights, BLOCK_M x CHUNKS BLOCK_N of them, are kept in registers.

    For N up to CHUNKS BLOCK_N: D is computed once. Program: (image, row tile).
    """
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(n, BLOCK_M)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    features += image * n * D
    reference += image * n * D
    stats += image * 6 * n
    gradient += image * n * D
    units += image * n * ((D + UNIT_WIDTH - 1) // UNIT_WIDTH)
    unit = 1.0
    inverse_unit = 1.0
    if features.dtype.element_ty == tl.float16 and (SQUARED or NORMALIZE):
        unit, inverse_unit = _operand_scale(stats, n, SQUARED, NORMALIZE)
    value = 0.0
    slope = tl.zeros([BLOCK_M], tl.float32)
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        j = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        w, part_value, part_slope = _weights(
            features, reference, stats, unit, i, j, n, D, SQUARED, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        weights = weights + (w,)  # type: ignore[assignment]  # noqa: RUF005  # what Triton knows
        value += part_value
        if NORMALIZE:
            slope += part_slope
    tl.store(values + tl.program_id(0), value * weight)
    if NORMALIZE:
        tl.store(stats + SLOPE * n + i, slope * inverse_unit, mask=i < n)
    o_d = tl.arange(0, BLOCK_D)
    for part in tl.range(PARTS, num_stages=2):
        columns = part * BLOCK_D + o_d
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            j = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = (j < n)[:, None]
            if D % BLOCK_D != 0:
                mask = mask & (columns < D)[None, :]
            f_j = tl.load(features + j[:, None] * D + columns[None, :], mask=mask, other=0.0)
            total = tl.dot(weights[chunk], f_j, total, input_precision=PRECISION)
        _save(total, inverse_unit, gradient, units, i, part, n, D, BLOCK_D)


@triton.jit(do_not_specialize=["n"])
def sliced_kernel(
    features: tl.tensor,
    reference: tl.tensor,
    stats: tl.tensor,
    values: tl.tensor,
    gradient: tl.tensor,
    units: tl.tensor,
    weight: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Value and gradient of a row tile in SLICE BLOCK_D columns, for any N: the gradient is kept in registers.

    D is computed anew for every slice; the first one writes the value. Program: (image, row tile, slice).
    """
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    SLICES: tl.constexpr = (PARTS + SLICE - 1) // SLICE
    tiles = tl.cdiv(n, BLOCK_M)
    tile = tl.program_id(0) // SLICES
    first_part = tl.program_id(0) % SLICES * SLICE
    image = (tile // tiles).to(tl.int64)
    i = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    features += image * n * D
    reference += image * n * D
    stats += image * 6 * n
    gradient += image * n * D
    units += image * n * ((D + UNIT_WIDTH - 1) // UNIT_WIDTH)
    unit = 1.0
    inverse_unit = 1.0
    if features.dtype.element_ty == tl.float16 and (SQUARED or NORMALIZE):
        unit, inverse_unit = _operand_scale(stats, n, SQUARED, NORMALIZE)
    value = 0.0
    slope = tl.zeros([BLOCK_M], tl.float32)
    totals = ()
    for _ in tl.static_range(SLICE):
        totals = totals + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    o_d = tl.arange(0, BLOCK_D)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        w, part_value, part_slope = _weights(
            features, reference, stats, unit, i, j, n, D, SQUARED, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        value += part_value
        if NORMALIZE:
            slope += part_slope
        sums = ()
        for index in tl.static_range(SLICE):
            columns = (first_part + index) * BLOCK_D + o_d
            mask = (j < n)[:, None]
            if D % (SLICE * BLOCK_D) != 0:
                mask = mask & (columns < D)[None, :]
            f_j = tl.load(features + j[:, None] * D + columns[None, :], mask=mask, other=0.0)
            total = tl.dot(w, f_j, totals[index], input_precision=PRECISION)
            sums = sums + (total,)  # type: ignore[assignment]  # noqa: RUF005
        totals = sums
    if first_part == 0:
        tl.store(values + tile, value * weight)
        if NORMALIZE:
            tl.store(stats + SLOPE * n + i, slope * inverse_unit, mask=i < n)
    for index in tl.static_range(SLICE):
        if (first_part + index) * BLOCK_D < D:
            _save(totals[index], inverse_unit, gradient, units, i, first_part + index, n, D, BLOCK_D)


@triton.jit(do_not_specialize=["n"])
def value_kernel(
    features: tl.tensor,
    reference: tl.tensor,
    stats: tl.tensor,
    values: tl.tensor,
    difference: tl.tensor,
    weight: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Value of one tile of D without a gradient; entries above the diagonal count twice, those below are left out.

    WRITE: D itself into `difference`, (B, N, N), instead of the value. Program: (image, row tile, column tile).
    """
    columns = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(n, BLOCK_M) * columns
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first_i = tile // columns * BLOCK_M
    first_j = tile % columns * BLOCK_N
    i = first_i + tl.arange(0, BLOCK_M)
    j = first_j + tl.arange(0, BLOCK_N)
    features += image * n * D
    reference += image * n * D
    stats += image * 6 * n
    if WRITE:
        d, _ = difference_tile(features, reference, stats, i, j, n, D, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        mask = (i < n)[:, None] & (j < n)[None, :]
        tl.store(difference + image * n * n + i[:, None] * n + j[None, :], d, mask=mask)
    else:
        value = 0.0
        if first_j + BLOCK_N > first_i:
            d, _ = difference_tile(
                features, reference, stats, i, j, n, D, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
            size = d * d if SQUARED else tl.abs(d)
            size *= tl.where(i[:, None] < j[None, :], 2.0, tl.where(i[:, None] == j[None, :], 1.0, 0.0))
            value = tl.sum(tl.sum(size, axis=1), axis=0)
        tl.store(values + tl.program_id(0), value * weight)


class _ByVariant(dict[str, "triton.JITFunction"]):
    """Kernels by the first word of a variant's name."""

    def __missing__(self, name: str) -> "triton.JITFunction":
        return self[name.split(maxsplit=1)[0]]


# What the ahead-of-time compiler asks a family for, under the names it asks for.
FLOW = _ByVariant(rows=rows_kernel, whole=whole_kernel, sliced=sliced_kernel, value=value_kernel, finish=finish_kernel)
KINDS = {
    **dict.fromkeys(("features", "reference", "gradient", "output"), "weight"),
    **dict.fromkeys(("stats", "values", "units", "difference", "upstream"), "float32"),
    **dict.fromkeys(("n", "rows", "upstream_stride"), "int32"),
    **dict.fromkeys(("weight", "factor"), "scalar"),
}


def constants(variant: str, dim: int, tile: Tile) -> dict[str, int | str]:
    """Compile-time constants of a variant, from its name and tile; see `fastfsl.kernels.gram_tiles.Variant`."""
    options = (option.split("=") for option in variant.split()[1:])
    sizes = {"D": dim, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
    given = {name: int(value) if value.isdigit() else value for name, value in options}
    return {name: value for name, value in (sizes | given).items() if name in FLOW[variant].arg_names}
