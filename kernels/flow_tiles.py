"""What a program does with one tile of the flow: row statistics, products, and the phases between two barriers.

A kernel of `flow_kernels` is one of these phases, the persistent kernel all of them in turn. x, u, h, hidden, total and
out are (n, D), n D below 2^31; weight (D, D) with outputs as rows; bias and the rows of tables (D,); stats
(n, tiles, 2). Rows from n on, and columns from D on where BLOCK_N does not divide D, are not there: an index into them
is clamped where whole rows are read along the depth, and masked elsewhere.

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


@triton.jit
def clamped(tile: tl.tensor, limit: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Indices of a tile, those from `limit` on replaced by the last one below."""
    return tl.minimum(tile * BLOCK + tl.arange(0, BLOCK), limit - 1)


@triton.jit
def tile_places(
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the elements of a tile lie in an (n, D) matrix, (BLOCK_M, BLOCK_N), and a mask of those that do."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    places = rows[:, None] * D + columns[None, :]
    if D % BLOCK_N != 0:
        return places, (rows < n)[:, None] & (columns < D)[None, :]
    else:
        return places, (rows < n)[:, None]


@triton.jit
def column_vector(vector: tl.tensor, column_tile: tl.tensor, D: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """A column tile of a vector (D,), as (1, BLOCK_N)."""
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if D % BLOCK_N != 0:
        values = tl.load(vector + columns, mask=columns < D, other=0.0)
    else:
        values = tl.load(vector + columns)
    return values[None, :]


@triton.jit
def row_moments(
    stats: tl.tensor, rows: tl.tensor, D: tl.constexpr, BLOCK_N: tl.constexpr, CACHE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and 1 / sqrt(variance + eps) of rows, merged from the statistics of their column tiles; each (rows, 1)."""
    TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.arange(0, triton.next_power_of_2(TILES))
    counts = tl.maximum(tl.minimum(D - tile * BLOCK_N, BLOCK_N), 0).to(tl.float32)[None, :]
    places = stats + rows[:, None] * (2 * TILES) + 2 * tile[None, :]
    means = tl.load(places, mask=(tile < TILES)[None, :], other=0.0, cache_modifier=CACHE)
    squares = tl.load(places + 1, mask=(tile < TILES)[None, :], other=0.0, cache_modifier=CACHE)
    mean = tl.sum(counts * means, axis=1, keep_dims=True) / D
    variance = tl.sum(squares + counts * (means - mean) * (means - mean), axis=1, keep_dims=True) / D
    return mean, tl.rsqrt(variance + NORM_EPS)


@triton.jit
def store_moments(
    stats: tl.tensor,
    h: tl.tensor,
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Leave the mean and the sum of squared deviations of each row of a tile h, (BLOCK_M, BLOCK_N), as stored."""
    TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    h = h.to(tl.float32)
    if D % BLOCK_N != 0:
        count = tl.minimum(D - column_tile * BLOCK_N, BLOCK_N).to(tl.float32)
        columns = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N) < D)[None, :]
        mean = tl.sum(tl.where(columns, h, 0.0), axis=1) / count
        deviation = tl.where(columns, h - mean[:, None], 0.0)
    else:
        mean = tl.sum(h, axis=1) / BLOCK_N
        deviation = h - mean[:, None]
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    places = stats + rows * (2 * TILES) + 2 * column_tile
    tl.store(places, mean, mask=rows < n)
    tl.store(places + 1, tl.sum(deviation * deviation, axis=1), mask=rows < n)


@triton.jit
def product(
    x: tl.tensor,
    weight: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> tl.tensor:
    """Rows and columns of x W^T, float32; x is rounded to the weight's dtype."""
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
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
    rows: tl.tensor,
    columns: tl.tensor,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> tl.tensor:
    """Rows and columns of m W^T, float32, with m = (h - mean) rstd a + c; a and c lie at table and table + D."""
    depth = tl.arange(0, BLOCK_K)
    h_tile = h + rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for k in range(0, D, BLOCK_K):
        value = tl.load(h_tile + k, cache_modifier=CACHE).to(tl.float32)
        a, c = tl.load(table + k + depth)[None, :], tl.load(table + D + k + depth)[None, :]
        m = ((value - mean) * rstd * a + c).to(weight.dtype.element_ty)
        sums = tl.dot(m, tl.load(weight_tile + k), sums, input_precision=PRECISION)
    return sums


@triton.jit
def enter_tile(
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    u: tl.tensor,
    h: tl.tensor,
    stats: tl.tensor,
    total: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> None:
    """u = x W^T + b, h = u with its statistics, total = 0."""
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    value = product(x, weight, rows, columns, D, BLOCK_K, PRECISION, CACHE) + column_vector(
        bias, column_tile, D, BLOCK_N
    )
    state = value.to(h.dtype.element_ty)
    places, mask = tile_places(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    tl.store(u + places, value, mask=mask)
    tl.store(total + places, tl.zeros_like(value), mask=mask)
    tl.store(h + places, state, mask=mask)
    store_moments(stats, state, row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)


@triton.jit
def first_tile(
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    h: tl.tensor,
    stats: tl.tensor,
    table: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    hidden: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> None:
    """hidden = silu((LN(h) a + c) W^T + b); table: a | c | gate."""
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mean, rstd = row_moments(stats, rows, D, BLOCK_N, CACHE)
    value = normalised_product(h, mean, rstd, table, weight, rows, columns, D, BLOCK_K, PRECISION, CACHE)
    value += column_vector(bias, column_tile, D, BLOCK_N)
    places, mask = tile_places(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    tl.store(hidden + places, (value * tl.sigmoid(value)).to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def second_tile(
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    table: tl.tensor,
    h: tl.tensor,
    stats: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> None:
    """h <- h + gate (hidden W^T + b), in place, with its statistics; table: a | c | gate."""
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    value = product(hidden, weight, rows, columns, D, BLOCK_K, PRECISION, CACHE)
    value += column_vector(bias, column_tile, D, BLOCK_N)
    gate = column_vector(table + 2 * D, column_tile, D, BLOCK_N)
    places, mask = tile_places(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    before = tl.load(h + places, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    state = (before + gate * value).to(h.dtype.element_ty)
    tl.store(h + places, state, mask=mask)
    store_moments(stats, state, row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)


@triton.jit
def carry_tile(
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    h: tl.tensor,
    stats: tl.tensor,
    table: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    step_size: tl.tensor,
    u: tl.tensor,
    next_h: tl.tensor,
    next_stats: tl.tensor,
    total: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> None:
    """u <- u + step_size (m W^T + b) and total += m with m = LN(h) a + c; next_h = u with its statistics."""
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mean, rstd = row_moments(stats, rows, D, BLOCK_N, CACHE)
    places, mask = tile_places(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    # Before the product: after it, the registers are full of sums.
    a, c = column_vector(table, column_tile, D, BLOCK_N), column_vector(table + D, column_tile, D, BLOCK_N)
    m = (tl.load(h + places, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32) - mean) * rstd * a + c
    tl.store(total + places, tl.load(total + places, mask=mask, other=0.0, cache_modifier=CACHE) + m, mask=mask)
    value = normalised_product(h, mean, rstd, table, weight, rows, columns, D, BLOCK_K, PRECISION, CACHE)
    value += column_vector(bias, column_tile, D, BLOCK_N)
    value = tl.load(u + places, mask=mask, other=0.0, cache_modifier=CACHE) + step_size * value
    state = value.to(next_h.dtype.element_ty)
    tl.store(u + places, value, mask=mask)
    tl.store(next_h + places, state, mask=mask)
    store_moments(next_stats, state, row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)


@triton.jit
def exit_tile(
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    x: tl.tensor,
    h: tl.tensor,
    stats: tl.tensor,
    table: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    step_size: tl.tensor,
    done: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
) -> None:
    """out = x + step_size ((total + m) W^T + done b) with m = LN(h) a + c."""
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mean, rstd = row_moments(stats, rows, D, BLOCK_N, CACHE)
    depth = tl.arange(0, BLOCK_K)
    row_places = rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The mean over the steps is rounded, not the sum: however many they are, it stays within the range of float16.
    share = 1.0 / done
    for k in range(0, D, BLOCK_K):
        value = tl.load(h + row_places + k, cache_modifier=CACHE).to(tl.float32)
        a, c = tl.load(table + k + depth)[None, :], tl.load(table + D + k + depth)[None, :]
        value = (value - mean) * rstd * a + c + tl.load(total + row_places + k, cache_modifier=CACHE)
        value = (value * share).to(weight.dtype.element_ty)
        sums = tl.dot(value, tl.load(weight_tile + k), sums, input_precision=PRECISION)
    sums += column_vector(bias, column_tile, D, BLOCK_N)
    places, mask = tile_places(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    before = tl.load(x + places, mask=mask, other=0.0, cache_modifier=CACHE)
    tl.store(out + places, before + step_size * done * sums, mask=mask)
