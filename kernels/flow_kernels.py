"""The kernels of the fused Euler flow, one launch a phase; the launches of a flow: `fastfsl.bundle.flow_launches`.

    enter    u = x W^T + b;  h = u;  total = 0
    first    hidden = silu(m W^T + b),  m = LN(h) a + c
    second   h <- h + gate (hidden W^T + b)
    carry    u <- u + step_size (m W^T + b);  next_h = u;  total += m
    exit     out = x + step_size ((total + m) W^T + done b)
    logits   logit_scale x . class / max(|x|, 1e-12)

x, u, h, hidden, total and out are (n, D), weights (D, D) with outputs as rows. x, u, total, out, statistics, biases and
tables are float32, weights and hidden have the products' dtype, h that of the state; sums are float32. A block reads
and writes 4 activations an element, 8 bytes in 16 bits, and 16 bytes of statistics a row and column tile. The grid is
(column tiles, row tiles): programs that share rows of h run side by side, and the weights stay in the L2 cache.

Reference: fastfsl.flow.plan.plan_states.
"""

from typing import Any, Final, Literal

import triton
import triton.language as tl

from fastfsl.bundle.flow_launches import FLOW_KERNELS
from fastfsl.kernels.flow_phases import carry_tile, enter_tile, exit_tile, first_tile, second_tile
from fastfsl.kernels.flow_tiles import clamped
from fastfsl.kernels.tiles import Tile

# Of torch.nn.functional.normalize.
LENGTH_EPS: Final = tl.constexpr(1e-12)

Kind = Literal["float32", "weight", "state", "counters", "int32", "scalar"]
# What a parameter of a kernel is: a pointer to float32, to the products' dtype, to that of h or to int32 ("counters"),
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
def begin(DEPENDENT: tl.constexpr) -> None:
    """Where a launch may begin before the one before it ends: let the next begin, and wait for that one's results."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


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
    DEPENDENT: tl.constexpr,
) -> None:
    """u = x W^T + b, h = u with its statistics, total = 0."""
    begin(DEPENDENT)
    enter_tile(
        tl.program_id(1),
        tl.program_id(0),
        x,
        weight,
        bias,
        u,
        h,
        stats,
        total,
        n,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
        "",
    )


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
    DEPENDENT: tl.constexpr,
) -> None:
    """hidden = silu((LN(h) a + c) W^T + b); table: a | c | gate."""
    begin(DEPENDENT)
    first_tile(
        tl.program_id(1),
        tl.program_id(0),
        h,
        stats,
        table,
        weight,
        bias,
        hidden,
        n,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
        "",
    )


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
    DEPENDENT: tl.constexpr,
) -> None:
    """h <- h + gate (hidden W^T + b), in place, with its statistics; table: a | c | gate."""
    begin(DEPENDENT)
    second_tile(
        tl.program_id(1),
        tl.program_id(0),
        hidden,
        weight,
        bias,
        table,
        h,
        stats,
        n,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
        "",
    )


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
    DEPENDENT: tl.constexpr,
) -> None:
    """u <- u + step_size (m W^T + b) and total += m with m = LN(h) a + c; next_h = u with its statistics."""
    begin(DEPENDENT)
    carry_tile(
        tl.program_id(1),
        tl.program_id(0),
        h,
        stats,
        table,
        weight,
        bias,
        step_size,
        u,
        next_h,
        next_stats,
        total,
        n,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
        "",
    )


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
    DEPENDENT: tl.constexpr,
) -> None:
    """out = x + step_size ((total + m) W^T + done b) with m = LN(h) a + c."""
    begin(DEPENDENT)
    exit_tile(
        tl.program_id(1),
        tl.program_id(0),
        x,
        h,
        stats,
        table,
        total,
        weight,
        bias,
        step_size,
        done,
        out,
        n,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
        "",
    )


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
    """logits = logit_scale features . class / max(|features|, 1e-12), (n, num_classes); classes (num_classes, D)."""
    column_tile, row_tile = tl.program_id(0), tl.program_id(1)
    depth = tl.arange(0, BLOCK_K)
    feature_tile = features + clamped(row_tile, n, BLOCK_M)[:, None] * D + depth[None, :]
    class_tile = classes + clamped(column_tile, num_classes, BLOCK_N)[None, :] * D + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, D, BLOCK_K):
        feature = tl.load(feature_tile + k)
        squares += tl.sum(feature * feature, axis=1)
        sums = tl.dot(feature, tl.load(class_tile + k), sums, input_precision=PRECISION)
    value = logit_scale * sums / tl.maximum(tl.sqrt(squares), LENGTH_EPS)[:, None]
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < n)[:, None] & (columns < num_classes)[None, :]
    tl.store(logits + rows[:, None] * num_classes + columns[None, :], value, mask=mask)


FLOW: Final[dict[str, Any]] = {
    "enter": enter_kernel,
    "first": first_kernel,
    "second": second_kernel,
    "carry": carry_kernel,
    "exit": exit_kernel,
    "logits": logits_kernel,
}


def constants(
    kernel: str, dim: int, tile: Tile, *, allow_tf32: bool = False, dependent: bool = False
) -> dict[str, int | str]:
    """The compile-time constants of a kernel, by parameter name.

    Args:
        kernel: one of FLOW, or "persistent".
        dim: d.
        tile: of `flow_tile`, or of `logits_tile` for "logits", of `persistent_tile` for "persistent".
        allow_tf32: float32 products may round their operands to 10 bits of mantissa; of no effect on other dtypes.
        dependent: launches may overlap (programmatic dependent launch, from sm_90 on); a launch that does not ask for
            it waits as ever.
    """
    precision = "tf32" if allow_tf32 else "tf32x3" if kernel == "logits" else "ieee"
    # `enter` and `exit` read float32 rows, twice the bytes: half the depth, in the same shared memory.
    depth = max(tile.depth // 2, 16) if kernel in {"enter", "exit"} else tile.depth
    sizes: dict[str, int | str] = {
        "D": dim,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": depth,
        "PRECISION": precision,
    }
    return {**sizes, "DEPENDENT": dependent} if kernel in FLOW_KERNELS else sizes
