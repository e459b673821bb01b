"""Tile sizes of the flow kernels, as data: one table an architecture, no search at a user's first call.

All kernels of a flow share a tile, because each reads the column statistics that the one before it wrote by column
tile. Standard library only: the ahead-of-time compiler, the launchers and the command line read the same table.
Nothing here was measured on a card yet: the sizes rest on registers and shared memory, which the compiler reports.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

DTypeName = Literal["fp16", "bf16", "fp32"]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Bytes of dynamic shared memory that one program can have (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Largest number of rows of a class; a class has one tile, and one compiled file a kernel.
ROW_CLASSES: tuple[int | None, ...] = (64, 1024, 4096, None)
# Up to so many rows a flow is one launch with waits between its phases, unless the caller says otherwise. None: nothing
# has been measured on a card yet, and a graph of launches cannot hang.
PERSISTENT_ROWS = 0
# Whether a launch of a flow may begin before the one before it ends (programmatic dependent launch). Not until it has
# been seen to compute the same on a card.
DEPENDENT_LAUNCHES = False
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


# By row class. Up to 64 rows a launch is a chain of latencies: the smallest tile that tensor cores take, narrow, so
# that d / 32 multiprocessors share the weights, and deep, so that all of d = 512 is under way at once. Up to 1024 rows:
# 64 rows are what wgmma takes, and there are about as many tiles as multiprocessors; up to 4096 rows the same holds of
# 128 x 128. Beyond, the L2 cache sets the pace: 384 operands a K for 128 x 256 results, against 512 for two tiles of
# 128 x 128, and LayerNorm, which every program of a row of tiles does again, is done half as often. Where a program has
# 99 KiB, and on Ampere so that two fit, passes are 32 deep.
_SMALL = (Tile(16, 32, 256, 4, 3), Tile(64, 64, 64, 4, 4))
_99_KIB = (*_SMALL, Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3))
_AMPERE = (*_SMALL, Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 4))
_HOPPER = (*_SMALL, Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3))
# The tensor cores of sm_100 keep their sums elsewhere; for four warps the compiler then plans so few registers that
# some spill.
_SM_100 = (_HOPPER[0], Tile(64, 64, 64, 8, 4), *_HOPPER[2:])
_TILES = {80: _AMPERE, 86: _99_KIB, 89: _99_KIB, 90: _HOPPER, 100: _SM_100, 120: _99_KIB}
# float32 is for checking and for TF32: its products take four times the bytes, or no tensor cores at all.
_FLOAT32 = (Tile(16, 32, 64, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3))


def flow_tile(arch: int, dim: int, rows: int, dtype: DTypeName) -> Tile:
    """The tile of every kernel of a flow.

    Args:
        arch: compute capability times ten; an unknown one has the tile of the next lower one that is known.
        dim: d, a multiple of 16.
        rows: n.
        dtype: of the products' operands.
    """
    known = max((each for each in ARCHITECTURES if each <= arch), default=ARCHITECTURES[0])
    tile = (_FLOAT32 if dtype == "fp32" else _TILES[known])[row_class(rows)]
    # A cut tile computes columns that are not there: 640 = 2.5 x 256.
    columns = tile.columns if dim % tile.columns == 0 else min(tile.columns, 128)
    return replace(tile, columns=columns, depth=math.gcd(tile.depth, dim))


def persistent_tile(dim: int, dtype: DTypeName) -> Tile:
    """The tile of the flow in one launch, which has the registers of all phases: that of few rows with more warps."""
    tile = Tile(16, 32, 32, 4, 3) if dtype == "fp32" else Tile(16, 32, 128, 8, 4)
    return replace(tile, depth=math.gcd(tile.depth, dim))


def logits_tile(rows: int) -> Tile:
    """The tile of `logits`, on every architecture: a float32 product in three TF32 ones, which takes registers."""
    return Tile(16, 32, 16, 4, 3) if rows <= 64 else Tile(64, 64, 16, 4, 3)


def column_tiles(dim: int, tile: Tile) -> int:
    """Tiles of a row, the parts of its statistics."""
    return -(-dim // tile.columns)
