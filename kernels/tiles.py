"""Tile sizes of the flow kernels, as data: one table an architecture, no search at a user's first call.

All kernels of a flow share a tile, because each reads the column statistics that the one before it wrote by column
tile. Standard library only: the ahead-of-time compiler, the launchers and the command line read the same table.
Nothing here was measured on a card yet: the sizes rest on registers and shared memory, which the compiler reports.
"""

from dataclasses import dataclass
from typing import Literal

DTypeName = Literal["fp16", "bf16", "fp32"]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Bytes of dynamic shared memory that one program can have (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Largest number of rows of a class; a class has one tile, and one compiled file a kernel.
ROW_CLASSES: tuple[int | None, ...] = (64, 1024, None)
# More rows than this go through the flow in chunks, so that the activations of a chunk stay in the L2 cache.
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with what.

    Args:
        rows: BLOCK_M, rows of the tile.
        columns: BLOCK_N, columns of the tile, and of a part of the row statistics.
        depth: BLOCK_K, columns of the operands that a pass of the loop takes; divides the width.
        warps: of 32 threads.
        stages: passes whose operands are in shared memory at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def row_class(rows: int) -> int:
    """Which of ROW_CLASSES so many rows belong to."""
    return next(index for index, limit in enumerate(ROW_CLASSES) if limit is None or rows <= limit)


def row_bucket(rows: int) -> int:
    """The number of rows that a launch for so many is padded to: 1, 2, 4, ... 128, 256, ... 1024, 2048, ... 8192.

    Args:
        rows: 1 to CHUNK_ROWS.
    """
    if rows <= 128:
        return 1 << (rows - 1).bit_length()
    unit = 128 if rows <= 1024 else 1024
    return -(-rows // unit) * unit


def flow_tile(arch: int, dim: int, rows: int, dtype: DTypeName) -> Tile:
    """The tile of every kernel of a flow.

    Args:
        arch: compute capability times ten; an unknown one gets the tile of the next lower one that is known.
        dim: d, a multiple of 16.
        rows: n.
        dtype: of the products' operands.
    """
    depth = next(size for size in (64, 32, 16) if dim % size == 0)
    large = SHARED_MEMORY[max((known for known in ARCHITECTURES if known <= arch), default=80)] > 100 << 10
    if dtype == "fp32":
        return (
            Tile(16, 32, min(depth, 32), 4, 3),
            Tile(64, 64, min(depth, 32), 4, 3),
            Tile(64, 64, min(depth, 32), 4, 3),
        )[row_class(rows)]
    return (Tile(16, 32, depth, 4, 4), Tile(64, 64, depth, 4, 3), Tile(128, 128, depth, 8, 3 if large else 2))[
        row_class(rows)
    ]


def logits_tile(rows: int) -> Tile:
    """The tile of `logits`, on every architecture: a float32 product in three TF32 ones, which takes registers."""
    return (Tile(16, 32, 16, 4, 3), Tile(64, 64, 16, 4, 3), Tile(64, 64, 16, 4, 3))[row_class(rows)]


def column_tiles(dim: int, tile: Tile) -> int:
    """Tiles of a row, the parts of its statistics."""
    return -(-dim // tile.columns)
