"""The flow as a sequence of kernel launches, the one that torch's launchers and the torch-free runtime both carry out.

A step is, for every block, `first` (LayerNorm a + c, product, SiLU) and `second` (product, gate, residual), and then
`carry` (final LayerNorm, product, u <- u + h (W_in W_out m + W_in b_out)). `enter` comes before all, `exit` where a
state is read. The arguments of a launch are those of the kernel, under its parameters' names and in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fastfsl.errors import ShapeError

KernelName = Literal["enter", "first", "second", "carry", "exit"]
FLOW_KERNELS: tuple[KernelName, ...] = ("enter", "first", "second", "carry", "exit")

# More rows than this are computed in chunks of it, whose activations still fit in the second-level cache of a card.
MAX_BUCKET = 8192


@dataclass(frozen=True)
class Place:
    """An element of a buffer.

    Args:
        buffer: name of a plan's array, or of a work buffer.
        offset: which element, counted from the first.
    """

    buffer: str
    offset: int = 0


Argument = Place | int | float


@dataclass(frozen=True)
class Launch:
    """One kernel launch; the grid is (column tiles, row tiles) of the (rows, d) matrix it writes.

    Args:
        kernel: which.
        arguments: of its parameters, by name and in order, but for the compile-time constants.
    """

    kernel: KernelName
    arguments: dict[str, Argument]


def row_bucket(rows: int) -> int:
    """Rows that a launch over `rows` rows is made for: the next power of two up to 128, then the next multiple of 128.

    From 1024 on it is the next multiple of 1024. A CUDA graph is captured once for each; rows beyond those asked for
    are computed and not read.

    Args:
        rows: from 1 to `MAX_BUCKET`.

    Raises:
        ShapeError: it is not.
    """
    if not 1 <= rows <= MAX_BUCKET:
        raise ShapeError(f"expected from 1 to {MAX_BUCKET} rows, got {rows}; cut them into chunks")
    if rows <= 128:
        return 1 << (rows - 1).bit_length()
    step = 128 if rows <= 1024 else 1024
    return -(-rows // step) * step


def work_buffers(rows: int, dim: int, stat_tiles: int, num_states: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind of every work buffer of a flow of so many rows.

    Kinds: "float32"; "state", the dtype of the residual stream; "weight", that of the products' operands.

    Args:
        rows: n.
        dim: d.
        stat_tiles: column tiles of a row, each of which leaves its mean and its sum of squared deviations.
        num_states: states read after step 0.
    """
    matrix = (rows, dim)
    return {
        "x": (matrix, "float32"),
        "u": (matrix, "float32"),
        "total": (matrix, "float32"),
        "h_0": (matrix, "state"),
        "h_1": (matrix, "state"),
        "hidden": (matrix, "weight"),
        "stats_0": ((rows, stat_tiles, 2), "float32"),
        "stats_1": ((rows, stat_tiles, 2), "float32"),
        "states": ((num_states, rows, dim), "float32"),
    }


def flow_launches(
    *, rows: int, dim: int, num_blocks: int, step_size: float, read_steps: Sequence[int]
) -> Iterator[Launch]:
    """The launches that leave the states of the read steps in the buffer `states`, in their order.

    Args:
        rows: n, above 0.
        dim: d.
        num_blocks: B.
        step_size: h.
        read_steps: ascending steps, all above 0 (the state of step 0 is `x`); nothing is computed after the last.
    """
    if not read_steps:
        return
    weight_size, table_size = dim * dim, 3 * dim
    yield Launch(
        "enter",
        {
            "x": Place("x"),
            "weight": Place("input_weight"),
            "bias": Place("input_bias"),
            "u": Place("u"),
            "h": Place("h_0"),
            "stats": Place("stats_0"),
            "total": Place("total"),
            "n": rows,
        },
    )
    for step in range(read_steps[-1]):
        # `carry` reads whole rows of h and writes tiles of the next one: the two take turns.
        now, after = step % 2, (step + 1) % 2
        h, stats = Place(f"h_{now}"), Place(f"stats_{now}")
        for block in range(num_blocks):
            table = Place("block_table", (step * num_blocks + block) * table_size)
            yield Launch(
                "first",
                {
                    "h": h,
                    "stats": stats,
                    "table": table,
                    "weight": Place("first_weight", block * weight_size),
                    "bias": Place("first_bias", block * dim),
                    "hidden": Place("hidden"),
                    "n": rows,
                },
            )
            yield Launch(
                "second",
                {
                    "hidden": Place("hidden"),
                    "weight": Place("second_weight", block * weight_size),
                    "bias": Place("second_bias", block * dim),
                    "table": table,
                    "h": h,
                    "stats": stats,
                    "n": rows,
                },
            )
        table = Place("final_table", step * 2 * dim)
        done = step + 1
        if done in read_steps:
            yield Launch(
                "exit",
                {
                    "x": Place("x"),
                    "h": h,
                    "stats": stats,
                    "table": table,
                    "total": Place("total"),
                    "weight": Place("output_weight"),
                    "bias": Place("output_bias"),
                    "step_size": step_size,
                    "done": float(done),
                    "out": Place("states", read_steps.index(done) * rows * dim),
                    "n": rows,
                },
            )
        if done < read_steps[-1]:
            yield Launch(
                "carry",
                {
                    "h": h,
                    "stats": stats,
                    "table": table,
                    "weight": Place("carry_weight"),
                    "bias": Place("carry_bias"),
                    "step_size": step_size,
                    "u": Place("u"),
                    "next_h": Place(f"h_{after}"),
                    "next_stats": Place(f"stats_{after}"),
                    "total": Place("total"),
                    "n": rows,
                },
            )
