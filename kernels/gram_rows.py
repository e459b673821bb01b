"""What the Gram loss does row by row, before and after the tiles of `fastfsl.kernels.gram_kernels`.

    s = 1/|f|,   t = 1/|g|,   c = s - t;   gradient_i = factor s_i (r_i - s_i^2 p_i f_i)

with s = t = 1 and p = 0 where rows are not normalised.
"""

import triton
import triton.language as tl

# Rows of `stats`.
SCALE = tl.constexpr(0)  # s
REFERENCE_SCALE = tl.constexpr(1)  # t
CHANGE = tl.constexpr(2)  # c
DRIFT = tl.constexpr(3)  # at least |s f - t g|
LENGTH = tl.constexpr(4)  # max(s |f|, t |g|)
SLOPE = tl.constexpr(5)  # p, from the kernels of the gradient
NUM_STATS = 6
# Columns of r that share a unit; the narrowest tile of the gradient.
UNIT_WIDTH = tl.constexpr(32)


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
    """Statistics of BLOCK_M rows; reads 2 d elements a row and writes 6 floats."""
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
    scale = tl.where(mask, 1.0, 0.0)
    reference_scale = scale
    change = scale * 0
    length = tl.maximum(norm, reference_norm)
    if NORMALIZE:
        scale = tl.where(norm > 0, 1 / tl.where(norm > 0, norm, 1.0), 0.0)
        reference_scale = tl.where(reference_norm > 0, 1 / tl.where(reference_norm > 0, reference_norm, 1.0), 0.0)
        # 1/|f| - 1/|g| = (|g|^2 - |f|^2) / (|f| |g| (|f| + |g|)), without the cancellation.
        product = norm * reference_norm * (norm + reference_norm)
        change = -tl.sum(growth, axis=1) / tl.where(product > 0, product, 1.0)
        change = tl.where(product > 0, change, scale - reference_scale)
        drift = scale * drift + tl.abs(change) * reference_norm
        length = tl.where(length > 0, 1.0, 0.0)
    outputs = stats + image.to(tl.int64) * 6 * n + i
    tl.store(outputs + SCALE * n, scale, mask=mask)
    tl.store(outputs + REFERENCE_SCALE * n, reference_scale, mask=mask)
    tl.store(outputs + CHANGE * n, change, mask=mask)
    tl.store(outputs + DRIFT * n, drift, mask=mask)
    tl.store(outputs + LENGTH * n, length, mask=mask)
    tl.store(outputs + SLOPE * n, tl.zeros([BLOCK_M], tl.float32), mask=mask)


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
    UNITS: tl.constexpr = (D + UNIT_WIDTH - 1) // UNIT_WIDTH
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_i = i < rows
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offsets = i.to(tl.int64)[:, None] * D + columns[None, :]
    mask = m_i[:, None] & (columns < D)[None, :]
    image = i // n
    values = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
    values *= tl.load(units + i[:, None] * UNITS + (columns // UNIT_WIDTH)[None, :], mask=mask, other=0.0)
    scale = factor * tl.load(upstream + image * upstream_stride, mask=m_i, other=0.0)
    if NORMALIZE:
        p_i = stats + image.to(tl.int64) * 6 * n + i % n
        s_i = tl.load(p_i + SCALE * n, mask=m_i, other=0.0)
        slope = tl.load(p_i + SLOPE * n, mask=m_i, other=0.0)
        f_i = tl.load(features + offsets, mask=mask, other=0.0).to(tl.float32)
        values -= (slope * s_i * s_i)[:, None] * f_i
        scale *= s_i
    tl.store(output + offsets, (values * scale[:, None]).to(output.dtype.element_ty), mask=mask)
