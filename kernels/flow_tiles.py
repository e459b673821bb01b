"""What the phases of the flow do with one tile: places and parts of it, statistics of its rows, products.

Matrices are (n, D), n D below 2^31, weights (D, D) with outputs as rows, statistics (n, tiles, 2). Rows from n on, and
columns from D on where BLOCK_N does not divide D, are not there: an index into them is clamped where whole rows are
read along the depth, and masked elsewhere.

LayerNorm needs a whole row, a program has a tile of it: each writer of h leaves, by row and column tile, the mean and
the sum of squared deviations of the values as stored, and each reader merges them, without a second pass over h and
without the cancellation of E[h^2] - E[h]^2.

Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
"""

from typing import Final

import triton
import triton.language as tl

# Of LayerNorm, as in the velocity field.
NORM_EPS: Final = tl.constexpr(1e-6)
LOG2_E: Final = tl.constexpr(1.4426950408889634)
# Column tiles whose statistics each thread loads by itself: of tiles of 128 columns, those of d = 1024.
FEW_TILES: Final = tl.constexpr(8)


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x / (1 + exp(-x)), with a square root where a division takes twice the instructions; 1 + exp(-x) may overflow."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return x * root * root


@triton.jit
def clamped(tile: tl.tensor, limit: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Indices of a tile, those from `limit` on replaced by the last one below."""
    return tl.minimum(tile * BLOCK + tl.arange(0, BLOCK), limit - 1)


@triton.jit
def places_of(
    row_tile: tl.tensor,
    part: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    CUT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where a part of a tile lies in an (n, D) matrix, (BLOCK_M, COLUMNS), and a mask of the elements that do."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    places = rows[:, None] * D + columns[None, :]
    if CUT:
        return places, (rows < n)[:, None] & (columns < D)[None, :]
    else:
        return places, (rows < n)[:, None]


@triton.jit
def vector_part(
    vector: tl.tensor, part: tl.tensor, D: tl.constexpr, COLUMNS: tl.constexpr, CUT: tl.constexpr
) -> tl.tensor:
    """A part of a vector (D,), as (1, COLUMNS)."""
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    if CUT:
        values = tl.load(vector + columns, mask=columns < D, other=0.0)
    else:
        values = tl.load(vector + columns)
    return values[None, :]


@triton.jit
def load_part(
    matrix: tl.tensor,
    row_tile: tl.tensor,
    part: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    CUT: tl.constexpr,
    CACHE: tl.constexpr,
) -> tl.tensor:
    """A part of a tile of an (n, D) matrix, 0 outside."""
    places, mask = places_of(row_tile, part, n, D, BLOCK_M, COLUMNS, CUT)
    return tl.load(matrix + places, mask=mask, other=0.0, cache_modifier=CACHE)


@triton.jit
def halves(sums: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The left and the right half of the columns."""
    left, right = tl.split(sums.reshape(sums.shape[0], 2, sums.shape[1] // 2).permute(0, 2, 1))
    return left, right


@triton.jit
def parts_of(sums: tl.tensor, COLUMNS: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The columns of a tile's sums in parts of so many, from the left."""
    if sums.shape[1] <= COLUMNS:
        return (sums,)
    else:
        left, right = halves(sums)
        return parts_of(left, COLUMNS) + parts_of(right, COLUMNS)  # type: ignore[no-any-return]  # jitted: no type


@triton.jit
def row_moments(
    stats: tl.tensor, rows: tl.tensor, D: tl.constexpr, BLOCK_N: tl.constexpr, CACHE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and 1 / sqrt(variance + eps) of rows, merged from the statistics of their column tiles; each (rows, 1).

    By loads and elementwise operations alone where there are few: the compiler then normalises in the registers that
    the product reads, where a reduction sends every operand through shared memory once more. Many are reduced: every
    thread would have to load them all.
    """
    TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    if TILES > FEW_TILES:
        tile = tl.arange(0, triton.next_power_of_2(TILES))
        counts = tl.maximum(tl.minimum(D - tile * BLOCK_N, BLOCK_N), 0).to(tl.float32)[None, :]
        places = stats + rows[:, None] * (2 * TILES) + 2 * tile[None, :]
        means = tl.load(places, mask=(tile < TILES)[None, :], other=0.0, cache_modifier=CACHE)
        parts = tl.load(places + 1, mask=(tile < TILES)[None, :], other=0.0, cache_modifier=CACHE)
        mean = tl.sum(counts * means, axis=1, keep_dims=True) * (1.0 / D)
        squares = tl.sum(parts + counts * (means - mean) * (means - mean), axis=1, keep_dims=True)
        return mean, tl.rsqrt(squares * (1.0 / D) + NORM_EPS)
    else:
        places = stats + rows[:, None] * (2 * TILES)
        mean = tl.load(places, cache_modifier=CACHE)
        squares = tl.load(places + 1, cache_modifier=CACHE)
        for tile in tl.static_range(1, TILES):
            before = tile * BLOCK_N
            count = min(D - before, BLOCK_N)
            difference = tl.load(places + 2 * tile, cache_modifier=CACHE) - mean
            mean += difference * (count / (before + count))
            squares += tl.load(places + 2 * tile + 1, cache_modifier=CACHE)
            squares += difference * difference * (before * count / (before + count))
        return mean, tl.rsqrt(squares * (1.0 / D) + NORM_EPS)


@triton.jit
def with_moments(
    mean: tl.tensor,
    squares: tl.tensor,
    h: tl.tensor,
    part: tl.tensor,
    before: tl.constexpr,
    D: tl.constexpr,
    CUT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and sum of squared deviations of rows whose first `before` columns have these, and a part h, as stored."""
    COLUMNS: tl.constexpr = h.shape[1]
    h = h.to(tl.float32)
    if CUT:
        left = D - part * COLUMNS
        inside = (tl.arange(0, COLUMNS) < left)[None, :]
        count = tl.maximum(tl.minimum(left, COLUMNS), 0).to(tl.float32)
        part_mean = tl.sum(tl.where(inside, h, 0.0), axis=1) / tl.maximum(count, 1.0)
        deviation = tl.where(inside, h - part_mean[:, None], 0.0)
        share = count / (before + count)
    else:
        part_mean = tl.sum(h, axis=1) / COLUMNS
        deviation = h - part_mean[:, None]
        share = COLUMNS / (before + COLUMNS)
    difference = part_mean - mean
    squares += tl.sum(deviation * deviation, axis=1) + difference * difference * (before * share)
    return mean + difference * share, squares


@triton.jit
def store_moments(
    stats: tl.tensor,
    mean: tl.tensor,
    squares: tl.tensor,
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Leave the moments of a tile's rows, (BLOCK_M,), in the statistics."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    places = stats + rows * (2 * ((D + BLOCK_N - 1) // BLOCK_N)) + 2 * column_tile
    tl.store(places, mean, mask=rows < n)
    tl.store(places + 1, squares, mask=rows < n)


@triton.jit
def product(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> tl.tensor:
    """Rows and columns of x W^T + b, float32; x is rounded to the weight's dtype."""
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32) + bias
    for k in range(0, D, BLOCK_K):
        value = tl.load(x_tile + k, cache_modifier=CACHE).to(weight.dtype.element_ty)
        sums = tl.dot(value, tl.load(weight_tile + k), sums, input_precision=PRECISION)
    return sums


@triton.jit
def normalised_product(
    h: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    table: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> tl.tensor:
    """Rows and columns of m W^T + b, float32, with m = (h - mean) rstd a + c; a and c lie at table and table + D."""
    depth = tl.arange(0, BLOCK_K)
    h_tile = h + rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32) + bias
    for k in range(0, D, BLOCK_K):
        value = tl.load(h_tile + k, cache_modifier=CACHE).to(tl.float32)
        a, c = tl.load(table + k + depth)[None, :], tl.load(table + D + k + depth)[None, :]
        m = ((value * rstd - mean * rstd) * a + c).to(weight.dtype.element_ty)
        sums = tl.dot(m, tl.load(weight_tile + k), sums, input_precision=PRECISION)
    return sums
