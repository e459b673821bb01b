"""The kernels of the fused Euler flow: LayerNorm a + c -> product -> SiLU; product -> gate -> residual; carry; exit.

    enter    u = x W^T + b;  h = u
    first    hidden = silu(m W^T + b),  m = LN(h) a + c
    second   h <- h + gate (hidden W^T + b)
    carry    u <- u + step_size (m W^T + b);  h' = u;  total += m
    exit     out = x + step_size ((total + m) W^T + done b)
    logits   logit_scale * x . class / max(|x|, 1e-12)

Shapes: x, u, h, hidden, total, out (n, D), contiguous; weight (D, D), rows are outputs; bias (D,); stats (n, tiles, 2).
x, u, total, out, stats, bias and tables are float32, weight and hidden have the products' dtype, h has it too (the
"state" dtype may differ); sums are float32. The grid is (column tiles, row tiles).

LayerNorm needs a whole row, a program has a tile of it: each writer of h leaves, by row and column tile, the mean and
the sum of squared deviations of the values as stored, and each reader merges them, without a second pass over h and
without the cancellation of E[h^2] - E[h]^2 (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
variance"). A block reads and writes 4 activations an element in 16 bits, 8 bytes, and its two weights once a row tile.

Reference: fastfsl.flow.plan.plan_states.
"""

from typing import Any, Final, Literal

import triton
import triton.language as tl

from fastfsl.kernels.tiles import Tile

# Of LayerNorm, as in the velocity field.
NORM_EPS: Final = tl.constexpr(1e-6)
# Of torch.nn.functional.normalize.
LENGTH_EPS: Final = tl.constexpr(1e-12)

Kind = Literal["float32", "weight", "state", "int32", "scalar"]
# What each parameter is, in every kernel that has it: a pointer to float32, to the products' dtype or to that of h,
# or a number, int32 or float32 ("scalar"). The launchers and the ahead-of-time compiler derive types from it.
KINDS: Final[dict[str, Kind]] = {
    "x": "float32",
    "weight": "weight",
    "bias": "float32",
    "u": "float32",
    "h": "state",
    "stats": "float32",
    "total": "float32",
    "table": "float32",
    "hidden": "weight",
    "next_h": "state",
    "next_stats": "float32",
    "out": "float32",
    "step_size": "scalar",
    "done": "scalar",
    "features": "float32",
    "classes": "float32",
    "logits": "float32",
    "logit_scale": "scalar",
    "n": "int32",
    "num_classes": "int32",
}


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x sigmoid(x), in float32."""
    return x * tl.sigmoid(x)


@triton.jit
def clamped(tile: tl.tensor, limit: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Indices of a tile, those from `limit` on replaced by the last one below: loads need no mask."""
    return tl.minimum(tile * BLOCK + tl.arange(0, BLOCK), limit - 1)


@triton.jit
def inside(
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Which elements of a tile are in the matrix, (BLOCK_M, BLOCK_N)."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return (rows < n)[:, None] & (columns < D)[None, :]


@triton.jit
def row_moments(
    stats: tl.tensor, rows: tl.tensor, D: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and 1 / sqrt(variance + eps) of rows, merged from the statistics of their column tiles; each (rows, 1)."""
    TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.arange(0, triton.next_power_of_2(TILES))
    counts = tl.maximum(tl.minimum(D - tile * BLOCK_N, BLOCK_N), 0).to(tl.float32)[None, :]
    places = stats + rows[:, None] * (2 * TILES) + 2 * tile[None, :]
    means = tl.load(places, mask=(tile < TILES)[None, :], other=0.0)
    squares = tl.load(places + 1, mask=(tile < TILES)[None, :], other=0.0)
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
    """Leave mean and sum of squared deviations of the rows of a tile h, float32 but with the values as stored."""
    TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    count = tl.minimum(D - column_tile * BLOCK_N, BLOCK_N).to(tl.float32)
    if D % BLOCK_N != 0:
        columns = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N) < D)[None, :]
        mean = tl.sum(tl.where(columns, h, 0.0), axis=1) / count
        deviation = tl.where(columns, h - mean[:, None], 0.0)
    else:
        mean = tl.sum(h, axis=1) / count
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
) -> tl.tensor:
    """x W^T of a tile, x rounded to the weight's dtype, (rows, columns) in float32."""
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for k in range(0, D, BLOCK_K):
        value = tl.load(x_tile + k).to(weight.dtype.element_ty)
        sums = tl.dot(value, tl.load(weight_tile + k), sums, input_precision=PRECISION)
    return sums


@triton.jit
def normalised(
    h: tl.tensor, mean: tl.tensor, rstd: tl.tensor, table: tl.tensor, columns: tl.tensor, D: tl.constexpr
) -> tl.tensor:
    """m = (h - mean) rstd a + c of some columns of h, float32; a and c lie at table and table + D."""
    a, c = tl.load(table + columns), tl.load(table + D + columns)
    return (h.to(tl.float32) - mean) * rstd * a[None, :] + c[None, :]


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
) -> tl.tensor:
    """m W^T of a tile, (rows, columns) in float32, with m = LN(h) a + c made on the way to the product."""
    depth = tl.arange(0, BLOCK_K)
    h_tile = h + rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for k in range(0, D, BLOCK_K):
        m = normalised(tl.load(h_tile + k), mean, rstd, table, k + depth, D)
        sums = tl.dot(m.to(weight.dtype.element_ty), tl.load(weight_tile + k), sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["n"])
def enter_kernel(
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
) -> None:
    """u = x W^T + b, h = u with its statistics, total = 0."""
    column_tile, row_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mask = inside(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    places = rows[:, None] * D + columns[None, :]
    value = product(x, weight, rows, columns, D, BLOCK_K, PRECISION) + tl.load(bias + columns)[None, :]
    state = value.to(h.dtype.element_ty)
    tl.store(u + places, value, mask=mask)
    tl.store(h + places, state, mask=mask)
    tl.store(total + places, tl.zeros_like(value), mask=mask)
    store_moments(stats, state.to(tl.float32), row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["n"])
def first_kernel(
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
) -> None:
    """hidden = silu((LN(h) a + c) W^T + b); table: a | c | gate."""
    column_tile, row_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mean, rstd = row_moments(stats, rows, D, BLOCK_N)
    value = normalised_product(h, mean, rstd, table, weight, rows, columns, D, BLOCK_K, PRECISION)
    value = silu(value + tl.load(bias + columns)[None, :])
    mask = inside(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    tl.store(hidden + rows[:, None] * D + columns[None, :], value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def second_kernel(
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
) -> None:
    """h <- h + gate (hidden W^T + b), in place, with its statistics; table: a | c | gate."""
    column_tile, row_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    places = h + rows[:, None] * D + columns[None, :]
    value = product(hidden, weight, rows, columns, D, BLOCK_K, PRECISION) + tl.load(bias + columns)[None, :]
    gate = tl.load(table + 2 * D + columns)[None, :]
    state = (tl.load(places).to(tl.float32) + gate * value).to(h.dtype.element_ty)
    tl.store(places, state, mask=inside(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N))
    store_moments(stats, state.to(tl.float32), row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["n"])
def carry_kernel(
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
) -> None:
    """u <- u + step_size (m W^T + b) and total += m with m = LN(h) a + c; next_h = u with its statistics."""
    column_tile, row_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mask = inside(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    places = rows[:, None] * D + columns[None, :]
    mean, rstd = row_moments(stats, rows, D, BLOCK_N)
    value = normalised_product(h, mean, rstd, table, weight, rows, columns, D, BLOCK_K, PRECISION)
    value = tl.load(u + places) + step_size * (value + tl.load(bias + columns)[None, :])
    state = value.to(next_h.dtype.element_ty)
    tl.store(u + places, value, mask=mask)
    tl.store(next_h + places, state, mask=mask)
    store_moments(next_stats, state.to(tl.float32), row_tile, column_tile, n, D, BLOCK_M, BLOCK_N)
    m = normalised(tl.load(h + places), mean, rstd, table, columns, D)
    tl.store(total + places, tl.load(total + places) + m, mask=mask)


@triton.jit(do_not_specialize=["n"])
def exit_kernel(
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
) -> None:
    """out = x + step_size ((total + m) W^T + done b) with m = LN(h) a + c; the mean of m over the steps is rounded."""
    column_tile, row_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, D, BLOCK_N)
    mean, rstd = row_moments(stats, rows, D, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_places = rows[:, None] * D + depth[None, :]
    weight_tile = weight + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The mean, not the sum: however many steps there are, it stays within the range of float16.
    share = 1.0 / done
    for k in range(0, D, BLOCK_K):
        m = normalised(tl.load(h + row_places + k), mean, rstd, table, k + depth, D)
        m = (tl.load(total + row_places + k) + m) * share
        sums = tl.dot(m.to(weight.dtype.element_ty), tl.load(weight_tile + k), sums, input_precision=PRECISION)
    places = rows[:, None] * D + columns[None, :]
    value = tl.load(x + places) + step_size * done * (sums + tl.load(bias + columns)[None, :])
    tl.store(out + places, value, mask=inside(row_tile, column_tile, n, D, BLOCK_M, BLOCK_N))


@triton.jit(do_not_specialize=["n", "num_classes"])
def logits_kernel(
    features: tl.tensor,
    classes: tl.tensor,
    logit_scale: tl.tensor,
    logits: tl.tensor,
    n: tl.tensor,
    num_classes: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """logits = logit_scale * features . class / max(|features|, 1e-12), (n, num_classes); classes (num_classes, D)."""
    column_tile, row_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = clamped(row_tile, n, BLOCK_M), clamped(column_tile, num_classes, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    feature_tile = features + rows[:, None] * D + depth[None, :]
    class_tile = classes + columns[None, :] * D + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, D, BLOCK_K):
        feature = tl.load(feature_tile + k)
        squares += tl.sum(feature * feature, axis=1)
        sums = tl.dot(feature, tl.load(class_tile + k), sums, input_precision=PRECISION)
    value = logit_scale * sums / tl.maximum(tl.sqrt(squares), LENGTH_EPS)[:, None]
    mask = inside(row_tile, column_tile, n, num_classes, BLOCK_M, BLOCK_N)
    tl.store(logits + rows[:, None] * num_classes + columns[None, :], value, mask=mask)


FLOW: Final[dict[str, Any]] = {
    "enter": enter_kernel,
    "first": first_kernel,
    "second": second_kernel,
    "carry": carry_kernel,
    "exit": exit_kernel,
    "logits": logits_kernel,
}


def constants(kernel: str, dim: int, tile: Tile, *, allow_tf32: bool = False) -> dict[str, int | str]:
    """The compile-time constants of a kernel, by parameter name.

    Args:
        kernel: one of FLOW.
        dim: d.
        tile: of `flow_tile`, or of `logits_tile` for "logits".
        allow_tf32: float32 products may round their operands to 10 bits of mantissa; of no effect on other dtypes.
    """
    precision = "tf32" if allow_tf32 else "tf32x3" if kernel == "logits" else "ieee"
    return {"D": dim, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "PRECISION": precision}
