"""Triton kernels of the Gram alignment loss: D = S - S' by tiles, its value, and the gradient.

S_ij = s_i s_j f_i.f_j and S'_ij = t_i t_j g_i.g_j, with s = 1/|f| and t = 1/|g| where rows are normalised, else 1. With

    a_ij = f_i.f_j - g_i.g_j,   b_ij = g_i.g_j,   c = s - t   (free of cancellation, from `rows_kernel`)

it is D_ij = s_i s_j a_ij + (s_i c_j + c_i t_j) b_ij. W is sign(D) or D, and the gradient of a row is proportional to

    s_i (r_i - s_i^2 p_i f_i),   r_i = sum_j W_ij s_j f_j,   p_i = sum_j W_ij s_j f_i.f_j = r_i.f_i;

the second term, the projection, is there where rows are normalised. The torch form is fastfsl/manifold/gram.py.

`whole_kernel` or `sliced_kernel` give value, r and p in one pass over tiles of D, `finish_kernel` the gradient when its
factor is known, `value_kernel` the value alone. Shapes: features and reference (B, N, d), row-major; stats (B, 6, N)
float32; an image is a Gram matrix. Each program writes only its own part of every output and sums it in a fixed order:
the same bits every run. Compiled for six architectures, not yet run on a card.
"""

import triton
import triton.language as tl

from fastfsl.kernels.tiles import Tile

# Rows of `stats`.
SCALE = tl.constexpr(0)  # s
REFERENCE_SCALE = tl.constexpr(1)  # t
CHANGE = tl.constexpr(2)  # c
DRIFT = tl.constexpr(3)  # at least |s f - t g|
LENGTH = tl.constexpr(4)  # max(s |f|, t |g|)
SLOPE = tl.constexpr(5)  # p, from the kernels of the gradient
NUM_STATS = 6


@triton.jit(do_not_specialize=["n"])
def rows_kernel(
    features: tl.tensor,
    reference: tl.tensor,
    stats: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Statistics of BLOCK_M rows; reads 2 d elements a row and writes 5 floats."""
    tiles = tl.cdiv(n, BLOCK_M)
    image = tl.program_id(0) // tiles
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = i < n
    offsets = image.to(tl.int64) * n * D + i[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    reference_squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    drift_squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    growth = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k in range(0, D, BLOCK_K):
        f = tl.load(features + offsets + k, mask=mask[:, None], other=0.0).to(tl.float32)
        g = tl.load(reference + offsets + k, mask=mask[:, None], other=0.0).to(tl.float32)
        squares += f * f
        reference_squares += g * g
        drift_squares += (f - g) * (f - g)
        growth += (f - g) * (f + g)
    norm = tl.sqrt(tl.sum(squares, axis=1))
    reference_norm = tl.sqrt(tl.sum(reference_squares, axis=1))
    drift = tl.sqrt(tl.sum(drift_squares, axis=1))
    outputs = stats + image.to(tl.int64) * 6 * n + i
    if NORMALIZE:
        scale = tl.where(norm > 0, 1 / tl.where(norm > 0, norm, 1.0), 0.0)
        reference_scale = tl.where(reference_norm > 0, 1 / tl.where(reference_norm > 0, reference_norm, 1.0), 0.0)
        # 1/|f| - 1/|g| = (|g|^2 - |f|^2) / (|f| |g| (|f| + |g|)), without the cancellation.
        product = norm * reference_norm * (norm + reference_norm)
        change = -tl.sum(growth, axis=1) / tl.where(product > 0, product, 1.0)
        change = tl.where(product > 0, change, scale - reference_scale)
        tl.store(outputs + SCALE * n, scale, mask=mask)
        tl.store(outputs + REFERENCE_SCALE * n, reference_scale, mask=mask)
        tl.store(outputs + CHANGE * n, change, mask=mask)
        tl.store(outputs + DRIFT * n, scale * drift + tl.abs(change) * reference_norm, mask=mask)
        tl.store(outputs + LENGTH * n, tl.where(norm + reference_norm > 0, 1.0, 0.0), mask=mask)
    else:
        tl.store(outputs + DRIFT * n, drift, mask=mask)
        tl.store(outputs + LENGTH * n, tl.maximum(norm, reference_norm), mask=mask)


@triton.jit
def _products(
    features: tl.tensor,
    reference: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """a_ij and b_ij of one tile; b is 0 where rows are not normalised. Rows beyond n count as zeros."""
    o_k = tl.arange(0, BLOCK_K)
    p_i = i[:, None] * D + o_k[None, :]
    p_j = j[:, None] * D + o_k[None, :]
    m_i = (i < n)[:, None]
    m_j = (j < n)[:, None]
    a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        f_i = tl.load(features + p_i + k, mask=m_i, other=0.0)
        g_i = tl.load(reference + p_i + k, mask=m_i, other=0.0)
        f_j = tl.load(features + p_j + k, mask=m_j, other=0.0)
        g_j = tl.load(reference + p_j + k, mask=m_j, other=0.0)
        if features.dtype.element_ty == tl.float32:
            # Operands may be rounded to tf32: the difference is taken before.
            a = tl.dot(f_i, tl.trans(f_j - g_j), a, input_precision=PRECISION)
            a = tl.dot(f_i - g_i, tl.trans(g_j), a, input_precision=PRECISION)
            if NORMALIZE:
                b = tl.dot(g_i, tl.trans(g_j), b, input_precision=PRECISION)
        else:
            # Operands are exact. The two sums start anew in every block: they stay small, and where the tensor cores
            # cut off instead of rounding they lose the same, so that their difference is right to 1e-4 of itself.
            a = tl.dot(f_i, tl.trans(f_j), a)
            theirs = tl.dot(g_i, tl.trans(g_j))
            a -= theirs
            if NORMALIZE:
                b += theirs
    return a, b


@triton.jit
def _difference(
    features: tl.tensor,
    reference: tl.tensor,
    stats: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """D_ij and f_i.f_j of one tile, 0 beyond n; f_i.f_j only where rows are normalised."""
    a, b = _products(features, reference, i, j, n, D, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    d = a
    if NORMALIZE:
        s_i = tl.load(stats + SCALE * n + i, mask=i < n, other=0.0)[:, None]
        c_i = tl.load(stats + CHANGE * n + i, mask=i < n, other=0.0)[:, None]
        s_j = tl.load(stats + SCALE * n + j, mask=j < n, other=0.0)[None, :]
        t_j = tl.load(stats + REFERENCE_SCALE * n + j, mask=j < n, other=0.0)[None, :]
        c_j = tl.load(stats + CHANGE * n + j, mask=j < n, other=0.0)[None, :]
        d = s_i * s_j * a + (s_i * c_j + c_i * t_j) * b
        d = tl.where(i[:, None] == j[None, :], 0.0, d)
    return d, a + b


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
    d, product = _difference(features, reference, stats, i, j, n, D, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
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
    PARTS: tl.constexpr,
) -> None:
    """Write BLOCK_D columns of sum_j W_ij s_j f_j, in units of a power of two for every row of them.

    `total` times `inverse_unit` is that. Written are numbers below 2 in absolute value, so that float16 holds them.
    """
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (i < n)[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (columns < D)[None, :]
    row_unit, inverse = _power_of_two(tl.max(tl.abs(total), axis=1))
    rows = (total * inverse[:, None]).to(gradient.dtype.element_ty)
    tl.store(gradient + i[:, None] * D + columns[None, :], rows, mask=mask)
    tl.store(units + i * PARTS + part, row_unit * inverse_unit, mask=i < n)


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
    units += image * n * PARTS
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
        weights = weights + (w,)  # noqa: RUF005  # what Triton knows
        value += part_value
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
        _save(total, inverse_unit, gradient, units, i, part, n, D, BLOCK_D, PARTS)


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
    units += image * n * PARTS
    unit = 1.0
    inverse_unit = 1.0
    if features.dtype.element_ty == tl.float16 and (SQUARED or NORMALIZE):
        unit, inverse_unit = _operand_scale(stats, n, SQUARED, NORMALIZE)
    value = 0.0
    slope = tl.zeros([BLOCK_M], tl.float32)
    totals = ()
    for _ in tl.static_range(SLICE):
        totals = totals + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)  # noqa: RUF005
    o_d = tl.arange(0, BLOCK_D)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        w, part_value, part_slope = _weights(
            features, reference, stats, unit, i, j, n, D, SQUARED, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        value += part_value
        slope += part_slope
        sums = ()
        for index in tl.static_range(SLICE):
            columns = (first_part + index) * BLOCK_D + o_d
            mask = (j < n)[:, None]
            if D % (SLICE * BLOCK_D) != 0:
                mask = mask & (columns < D)[None, :]
            f_j = tl.load(features + j[:, None] * D + columns[None, :], mask=mask, other=0.0)
            total = tl.dot(w, f_j, totals[index], input_precision=PRECISION)
            sums = sums + (total,)  # noqa: RUF005
        totals = sums
    if first_part == 0:
        tl.store(values + tile, value * weight)
        if NORMALIZE:
            tl.store(stats + SLOPE * n + i, slope * inverse_unit, mask=i < n)
    for index in tl.static_range(SLICE):
        if (first_part + index) * BLOCK_D < D:
            _save(totals[index], inverse_unit, gradient, units, i, first_part + index, n, D, BLOCK_D, PARTS)


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
        d, _ = _difference(features, reference, stats, i, j, n, D, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        mask = (i < n)[:, None] & (j < n)[None, :]
        tl.store(difference + image * n * n + i[:, None] * n + j[None, :], d, mask=mask)
    else:
        value = 0.0
        if first_j + BLOCK_N > first_i:
            d, _ = _difference(features, reference, stats, i, j, n, D, NORMALIZE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            size = d * d if SQUARED else tl.abs(d)
            size *= tl.where(i[:, None] < j[None, :], 2.0, tl.where(i[:, None] == j[None, :], 1.0, 0.0))
            value = tl.sum(tl.sum(size, axis=1), axis=0)
        tl.store(values + tl.program_id(0), value * weight)


@triton.jit(do_not_specialize=["n", "rows", "upstream_stride"])
def finish_kernel(
    gradient: tl.tensor,
    units: tl.tensor,
    features: tl.tensor,
    stats: tl.tensor,
    upstream: tl.tensor,
    output: tl.tensor,
    factor: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    upstream_stride: tl.tensor,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The gradient, from what `_save` wrote; `output` may be `gradient`. Reads d or 2 d elements a row, writes d.

    Program: (tile of the B N rows, BLOCK_D columns).
    """
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    m_i = i < rows
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    offsets = i.to(tl.int64)[:, None] * D + columns[None, :]
    mask = m_i[:, None] & (columns < D)[None, :]
    image = i // n
    unit = tl.load(units + i * PARTS + part, mask=m_i, other=0.0)
    values = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32) * unit[:, None]
    scale = factor * tl.load(upstream + image * upstream_stride, mask=m_i, other=0.0)
    if NORMALIZE:
        p_i = stats + image.to(tl.int64) * 6 * n + i % n
        s_i = tl.load(p_i + SCALE * n, mask=m_i, other=0.0)
        slope = tl.load(p_i + SLOPE * n, mask=m_i, other=0.0)
        f_i = tl.load(features + offsets, mask=mask, other=0.0).to(tl.float32)
        values -= (slope * s_i * s_i)[:, None] * f_i
        scale *= s_i
    tl.store(output + offsets, (values * scale[:, None]).to(output.dtype.element_ty), mask=mask)


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
