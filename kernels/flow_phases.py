"""The phases of the flow, each on one tile: a kernel of `flow_kernels` is one, the persistent kernel all in turn.

x, u, h, hidden, total and out are (n, D); weight (D, D) with outputs as rows; bias and the rows of tables (D,); stats
(n, tiles, 2), written with every h. CACHE is how activations are read, "" or past the L1 cache.
"""

from typing import Final

import triton
import triton.language as tl

from fastfsl.kernels.flow_tiles import (
    clamped,
    load_part,
    normalised_product,
    parts_of,
    places_of,
    product,
    row_moments,
    silu,
    store_moments,
    vector_part,
    with_moments,
)

# Columns that are taken from the sums to memory at a time: with more, wide tiles run out of registers.
PART: Final = tl.constexpr(32)


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
    CUT: tl.constexpr = D % BLOCK_N != 0
    COLUMNS: tl.constexpr = min(BLOCK_N, PART)
    PARTS: tl.constexpr = BLOCK_N // COLUMNS
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    sums = product(x, weight, 0.0, rows, columns, D, BLOCK_K, PRECISION, CACHE)
    parts = parts_of(sums, COLUMNS)
    mean, squares = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for index in tl.static_range(PARTS):
        part = column_tile * PARTS + index
        places, mask = places_of(row_tile, part, n, D, BLOCK_M, COLUMNS, CUT)
        # The bias comes last: sums that are stored as they are would all leave their registers at once.
        value = parts[index] + vector_part(bias, part, D, COLUMNS, CUT)
        state = value.to(h.dtype.element_ty)
        tl.store(u + places, value, mask=mask)
        tl.store(total + places, tl.zeros_like(value), mask=mask)
        tl.store(h + places, state, mask=mask)
        mean, squares = with_moments(mean, squares, state, part, index * COLUMNS, D, CUT)
    store_moments(stats, mean, squares, row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)


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
    CUT: tl.constexpr = D % BLOCK_N != 0
    COLUMNS: tl.constexpr = min(BLOCK_N, PART)
    PARTS: tl.constexpr = BLOCK_N // COLUMNS
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mean, rstd = row_moments(stats, rows, D, BLOCK_N, CACHE)
    start = vector_part(bias, column_tile, D, BLOCK_N, CUT)
    sums = normalised_product(h, mean, rstd, table, weight, start, rows, columns, D, BLOCK_K, PRECISION, CACHE)
    parts = parts_of(sums, COLUMNS)
    for index in tl.static_range(PARTS):
        places, mask = places_of(row_tile, column_tile * PARTS + index, n, D, BLOCK_M, COLUMNS, CUT)
        tl.store(hidden + places, silu(parts[index]).to(hidden.dtype.element_ty), mask=mask)


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
    CUT: tl.constexpr = D % BLOCK_N != 0
    COLUMNS: tl.constexpr = min(BLOCK_N, PART)
    PARTS: tl.constexpr = BLOCK_N // COLUMNS
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    # The next two parts of h are always under way; of a narrow tile all of it, from the beginning.
    if PARTS == 1:
        before = load_part(h, row_tile, column_tile, n, D, BLOCK_M, COLUMNS, CUT, CACHE)
    start = vector_part(bias, column_tile, D, BLOCK_N, CUT)
    parts = parts_of(product(hidden, weight, start, rows, columns, D, BLOCK_K, PRECISION, CACHE), COLUMNS)
    if PARTS > 1:
        before = load_part(h, row_tile, column_tile * PARTS, n, D, BLOCK_M, COLUMNS, CUT, CACHE)
        coming = load_part(h, row_tile, column_tile * PARTS + 1, n, D, BLOCK_M, COLUMNS, CUT, CACHE)
    mean, squares = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for index in tl.static_range(PARTS):
        part = column_tile * PARTS + index
        places, mask = places_of(row_tile, part, n, D, BLOCK_M, COLUMNS, CUT)
        gate = vector_part(table + 2 * D, part, D, COLUMNS, CUT)
        state = (before.to(tl.float32) + gate * parts[index]).to(h.dtype.element_ty)
        if index + 1 < PARTS:
            before = coming
        if index + 2 < PARTS:
            coming = load_part(h, row_tile, part + 2, n, D, BLOCK_M, COLUMNS, CUT, CACHE)
        tl.store(h + places, state, mask=mask)
        mean, squares = with_moments(mean, squares, state, part, index * COLUMNS, D, CUT)
    store_moments(stats, mean, squares, row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)


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
    CUT: tl.constexpr = D % BLOCK_N != 0
    COLUMNS: tl.constexpr = min(BLOCK_N, PART)
    PARTS: tl.constexpr = BLOCK_N // COLUMNS
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    h_mean, rstd = row_moments(stats, rows, D, BLOCK_N, CACHE)
    start = vector_part(bias, column_tile, D, BLOCK_N, CUT)
    sums = normalised_product(h, h_mean, rstd, table, weight, start, rows, columns, D, BLOCK_K, PRECISION, CACHE)
    parts = parts_of(sums, COLUMNS)
    mean, squares = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for index in tl.static_range(PARTS):
        part = column_tile * PARTS + index
        places, mask = places_of(row_tile, part, n, D, BLOCK_M, COLUMNS, CUT)
        a, c = vector_part(table, part, D, COLUMNS, CUT), vector_part(table + D, part, D, COLUMNS, CUT)
        m = load_part(h, row_tile, part, n, D, BLOCK_M, COLUMNS, CUT, CACHE).to(tl.float32)
        m = (m * rstd - h_mean * rstd) * a + c
        m += load_part(total, row_tile, part, n, D, BLOCK_M, COLUMNS, CUT, CACHE)
        tl.store(total + places, m, mask=mask)
        value = load_part(u, row_tile, part, n, D, BLOCK_M, COLUMNS, CUT, CACHE) + step_size * parts[index]
        state = value.to(next_h.dtype.element_ty)
        tl.store(u + places, value, mask=mask)
        tl.store(next_h + places, state, mask=mask)
        mean, squares = with_moments(mean, squares, state, part, index * COLUMNS, D, CUT)
    store_moments(next_stats, mean, squares, row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)


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
    CUT: tl.constexpr = D % BLOCK_N != 0
    COLUMNS: tl.constexpr = min(BLOCK_N, PART)
    PARTS: tl.constexpr = BLOCK_N // COLUMNS
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mean, rstd = row_moments(stats, rows, D, BLOCK_N, CACHE)
    depth = tl.arange(0, BLOCK_K)
    row_places = rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + vector_part(bias, column_tile, D, BLOCK_N, CUT)
    # The mean over the steps is rounded, not the sum: however many they are, it stays within the range of float16.
    share = 1.0 / done
    for k in range(0, D, BLOCK_K):
        m = tl.load(h + row_places + k, cache_modifier=CACHE).to(tl.float32)
        a, c = tl.load(table + k + depth)[None, :], tl.load(table + D + k + depth)[None, :]
        m = (m * rstd - mean * rstd) * a + c + tl.load(total + row_places + k, cache_modifier=CACHE)
        m = (m * share).to(weight.dtype.element_ty)
        sums = tl.dot(m, tl.load(weight_tile + k), sums, input_precision=PRECISION)
    parts = parts_of(sums, COLUMNS)
    for index in tl.static_range(PARTS):
        part = column_tile * PARTS + index
        places, mask = places_of(row_tile, part, n, D, BLOCK_M, COLUMNS, CUT)
        before = load_part(x, row_tile, part, n, D, BLOCK_M, COLUMNS, CUT, CACHE)
        tl.store(out + places, before + step_size * done * parts[index], mask=mask)
