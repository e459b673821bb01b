"""The whole Euler flow in one launch, for batches so small that a launch takes longer than its work.

The phases are those of `flow_phases`; where a flow of launches relies on their order, all programs wait for each other
here. Every program takes the tiles program, program + programs, ... of a phase, so that any number of programs is
right; all must be on the card at once (a cooperative launch), or the first wait never ends. Activations are read past
the L1 cache, which is not coherent between multiprocessors.

Compiled, not yet run on a card.
"""

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from fastfsl.kernels.flow_kernels import KINDS as FLOW_KINDS
from fastfsl.kernels.flow_kernels import Kind, constants
from fastfsl.kernels.flow_phases import carry_tile, enter_tile, exit_tile, first_tile, second_tile
from fastfsl.kernels.tiles import Tile, column_tiles

# Rows beyond which a launch is no longer short beside its work.
MAX_ROWS: Final = 64
# The steps that are read are bits of an int32.
MAX_STEPS: Final = 30


@triton.jit
def wait_for_all(arrived: tl.tensor, expected: tl.tensor) -> tl.tensor:
    """Wait until every program has added 1 to `arrived`, so that it is `expected`; what they wrote is then visible.

    Returns:
        What to expect the next time.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < expected:
        pass
    tl.debug_barrier()
    return expected + tl.num_programs(0)


@triton.jit(do_not_specialize=["n", "num_blocks", "num_steps", "read_bits"])
def persistent_kernel(
    x: tl.tensor,
    input_weight: tl.tensor,
    input_bias: tl.tensor,
    first_weight: tl.tensor,
    first_bias: tl.tensor,
    second_weight: tl.tensor,
    second_bias: tl.tensor,
    output_weight: tl.tensor,
    output_bias: tl.tensor,
    carry_weight: tl.tensor,
    carry_bias: tl.tensor,
    block_table: tl.tensor,
    final_table: tl.tensor,
    u: tl.tensor,
    h: tl.tensor,
    hidden: tl.tensor,
    stats: tl.tensor,
    total: tl.tensor,
    states: tl.tensor,
    arrived: tl.tensor,
    step_size: tl.tensor,
    n: tl.tensor,
    num_blocks: tl.tensor,
    num_steps: tl.tensor,
    read_bits: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """`enter`, and for each step `first` and `second` of every block, `exit` where bit k of read_bits is 1, `carry`."""
    COLUMN_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_tiles = tl.cdiv(n, BLOCK_M) * COLUMN_TILES
    for tile in range(program, num_tiles, programs):
        enter_tile(
            *(tile // COLUMN_TILES, tile % COLUMN_TILES, x, input_weight, input_bias, u, h, stats, total, n),
            *(D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, ".cg"),
        )
    expected = wait_for_all(arrived, programs)
    num_read = 0
    for step in range(num_steps):
        now, after = step % 2, (step + 1) % 2
        h_now, stats_now = h + now * n * D, stats + now * n * (2 * COLUMN_TILES)
        for block in range(num_blocks):
            table = block_table + (step * num_blocks + block) * (3 * D)
            weight, bias = first_weight + block * (D * D), first_bias + block * D
            for tile in range(program, num_tiles, programs):
                first_tile(
                    *(tile // COLUMN_TILES, tile % COLUMN_TILES, h_now, stats_now, table, weight, bias, hidden, n),
                    *(D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, ".cg"),
                )
            expected = wait_for_all(arrived, expected)
            weight, bias = second_weight + block * (D * D), second_bias + block * D
            for tile in range(program, num_tiles, programs):
                second_tile(
                    *(tile // COLUMN_TILES, tile % COLUMN_TILES, hidden, weight, bias, table, h_now, stats_now, n),
                    *(D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, ".cg"),
                )
            expected = wait_for_all(arrived, expected)
        table = final_table + step * (2 * D)
        if (read_bits >> step) & 1 != 0:
            out = states + num_read * n * D
            for tile in range(program, num_tiles, programs):
                exit_tile(
                    *(tile // COLUMN_TILES, tile % COLUMN_TILES, x, h_now, stats_now, table, total),
                    *(output_weight, output_bias, step_size, 1.0 * (step + 1), out, n),
                    *(D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, ".cg"),
                )
            num_read += 1
            # `exit` reads whole rows of the total, and `carry` writes tiles of it.
            expected = wait_for_all(arrived, expected)
        if step + 1 < num_steps:
            for tile in range(program, num_tiles, programs):
                carry_tile(
                    *(tile // COLUMN_TILES, tile % COLUMN_TILES, h_now, stats_now, table, carry_weight, carry_bias),
                    *(step_size, u, h + after * n * D, stats + after * n * (2 * COLUMN_TILES), total, n),
                    *(D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, ".cg"),
                )
            expected = wait_for_all(arrived, expected)
    # The last to leave makes the counters ready for the next launch.
    if tl.atomic_add(arrived + 1, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(arrived, 0)
        tl.store(arrived + 1, 0)


# What the ahead-of-time compiler reads, as in `flow_kernels`.
FLOW: Final[dict[str, Any]] = {"persistent": persistent_kernel}
KINDS: Final[dict[str, Kind]] = {
    **FLOW_KINDS,
    **dict.fromkeys(("input_weight", "first_weight", "second_weight", "output_weight", "carry_weight"), "weight"),
    **dict.fromkeys(("input_bias", "first_bias", "second_bias", "output_bias", "carry_bias"), "float32"),
    **dict.fromkeys(("block_table", "final_table", "states"), "float32"),
    **dict.fromkeys(("num_blocks", "num_steps", "read_bits"), "int32"),
    "arrived": "counters",
}


def launch_persistent(
    arrays: dict[str, Tensor],
    buffers: dict[str, Tensor],
    *,
    rows: int,
    dim: int,
    num_blocks: int,
    step_size: float,
    read_steps: tuple[int, ...],
    tile: Tile,
    programs: int,
    allow_tf32: bool = False,
) -> None:
    """Enqueue a flow as one launch; the states are left in `buffers["states"]`.

    Args:
        arrays: the plan's, by name.
        buffers: work buffers, of which "h" and "stats" hold two; "arrived" is two int32, 0 before and after.
        rows: n.
        dim: d.
        num_blocks: B.
        step_size: h.
        read_steps: ascending, in 1..MAX_STEPS.
        tile: of every phase.
        programs: at most as many as the card holds at once.
        allow_tf32: as for `euler_flow`.
    """
    names = persistent_kernel.arg_names
    arguments: dict[str, Any] = {name: array for name, array in {**arrays, **buffers}.items() if name in names}
    persistent_kernel[(min(programs, column_tiles(dim, tile) * -(-rows // tile.rows)),)](
        **arguments,
        step_size=step_size,
        n=rows,
        num_blocks=num_blocks,
        num_steps=read_steps[-1],
        read_bits=sum(1 << (step - 1) for step in read_steps),
        **constants("persistent", dim, tile, allow_tf32=allow_tf32),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
        launch_cooperative_grid=True,
    )
